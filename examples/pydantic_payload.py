"""Payloads as pydantic models: the producer enqueues one, the handler gets one, and a wrong payload is a dead letter that names the field.

    pip install pydantic; python examples/pydantic_payload.py
"""
import datetime
import decimal
import functools
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Discard, Orchestrator

app = Orchestrator(metrics_port=0)


class Invoice(BaseModel, extra="forbid"):
    number: int = Field(ge=1)
    amount: decimal.Decimal = Field(gt=0, decimal_places=2)
    due: datetime.date
    currency: Literal["EUR", "USD"] = "EUR"


def handler(type, model, **policy):
    """Like app.handler, for a function of the model and the task."""
    def register(function):
        @app.handler(type, **policy)
        @functools.wraps(function)
        def run(task):
            try:
                payload = model.model_validate(task.payload)
            except ValidationError as error:   # retrying would not help: a wrong payload stays wrong
                raise Discard("; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())) from None
            return function(payload, task)
        return function
    return register


@handler("invoice:send", Invoice, max_retries=5)
def send(invoice, task):
    return invoice.model_copy(update={"amount": invoice.amount * 2})   # a model, too, may be the result


def main():
    due = datetime.date(2030, 1, 31)
    ids = [app.enqueue("invoice:send", Invoice(number=1, amount="19.90", due=due)),
           app.enqueue("invoice:send", {"number": 2, "amount": "5", "due": "soon", "currency": "XYZ"}),
           app.enqueue("invoice:send", {"number": 3, "amount": "0.001", "due": due, "paid": True})]
    app.drain()   # here and now; elsewhere a worker
    for task in map(app.get, ids):
        print(task["status"], task["result"] or task["last_error"])
    app.close()


if __name__ == "__main__":
    main()
