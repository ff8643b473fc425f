"""structlog: each line of a handler is JSON with its task's id, type and attempt, and so are the worker's own lines.

    pip install structlog; python examples/structured_logs.py

Without the package, LOG_FORMAT=json gives the same for what handlers log by Python's logging, with task_id alone.
"""
import logging
import sys
from pathlib import Path

import structlog

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Orchestrator

app = Orchestrator(metrics_port=0)
log = structlog.get_logger("shop")
old_log = logging.getLogger("a.library.that.knows.no.structlog")


@app.use
def with_task(task, call_next):
    """Coroutines and asyncio.to_thread() inherit these, too."""
    with structlog.contextvars.bound_contextvars(task_id=task.id, task_type=task.type, attempt=task.attempt):
        return call_next(task)


@app.handler("parcel:ship")
async def ship(task):
    log.info("shipping", order=task.payload["order"])
    old_log.warning("the printer is low on paper")


def set_up_logging():
    shared = [structlog.contextvars.merge_contextvars, structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name,
              structlog.stdlib.ExtraAdder(), structlog.processors.TimeStamper(fmt="iso", utc=True)]
    structlog.configure(processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
                        logger_factory=structlog.stdlib.LoggerFactory())
    formatter = structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[
        structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer()])
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=logging.INFO)   # before app.start(), which then leaves logging alone


def main():
    set_up_logging()
    app.enqueue("parcel:ship", {"order": 7})
    app.drain()   # here and now; elsewhere a worker
    log.info("outside of any task")
    app.close()


if __name__ == "__main__":
    main()
