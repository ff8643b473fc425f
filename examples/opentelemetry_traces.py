"""OpenTelemetry: one trace from the request that enqueues to the task that runs, and on to what that enqueues; a retry begins a new one.

    pip install opentelemetry-sdk; python examples/opentelemetry_traces.py

The spans go to standard output. A real program exports them with BatchSpanProcessor(OTLPSpanExporter()).
"""
import sys
from pathlib import Path

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Orchestrator, Snooze

app = Orchestrator(metrics_port=0)
tracer = trace.get_tracer("orchestrator")


@app.on_enqueue
def carry_on():
    """Each task gets the context of the span in which it is enqueued, as meta beside its payload."""
    carrier = {}
    propagate.inject(carrier)
    return {"trace": carrier} if carrier else None


@app.use
def traced(task, call_next):
    parent, links = propagate.extract((task.meta or {}).get("trace", {}), Context()), []
    if task.attempt > 1:   # perhaps hours later, so only a link leads back
        parent, links = Context(), [trace.Link(trace.get_current_span(parent).get_span_context())]
    with tracer.start_as_current_span(f"process {task.type}", parent, trace.SpanKind.CONSUMER, links=links, attributes={
            "messaging.system": "orchestrator", "messaging.operation.name": "process", "messaging.operation.type": "process",
            "messaging.destination.name": task.type, "messaging.message.id": task.id, "task.attempt": task.attempt}):
        try:   # an exception makes the span an error
            return call_next(task)
        except Snooze as snooze:
            later = snooze
    raise later


@app.handler("order:confirm", max_retries=3)
def confirm(task):
    if task.attempt == 1:
        raise ConnectionError("the mail server is busy")
    app.enqueue("order:ship", task.payload)


@app.handler("order:ship")
async def ship(task):
    with tracer.start_as_current_span("print the label"):
        return "shipped"


def main():
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=lambda span: span.to_json(indent=None) + "\n")))
    trace.set_tracer_provider(provider)
    with tracer.start_as_current_span("POST /orders", kind=trace.SpanKind.SERVER):
        app.enqueue("order:confirm", {"order": 7})
    app.drain(scheduled=True)   # here and now; elsewhere a worker, which repeats what failed after a while
    provider.shutdown()
    app.close()


if __name__ == "__main__":
    main()
