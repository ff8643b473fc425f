"""A payload checked by a dataclass: a wrong one is a dead letter at once, with an error that names the field.

    python examples/checked_payload.py
"""
import dataclasses
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Discard, Orchestrator

app = Orchestrator(metrics_port=0)


@dataclasses.dataclass(frozen=True)
class Resize:
    path: str
    width: int
    quality: int = 80

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, field.type):
                raise Discard(f"{field.name}: must be of type {field.type.__name__}")
        if not 1 <= self.width <= 10_000:
            raise Discard("width: must be from 1 to 10000")

    @classmethod
    def of(cls, payload):
        """The payload as a Resize. Raises Discard: retrying would not help, since a wrong payload stays wrong."""
        try:
            return cls(**payload)
        except TypeError as error:   # an unknown field, a missing field, or no object at all
            raise Discard(f"payload: {str(error).replace('Resize.__init__()', 'Resize')}") from None


@app.handler("image:resize")
def resize(task):
    wanted = Resize.of(task.payload)
    return f"{wanted.path} resized to {wanted.width} pixels at quality {wanted.quality}"


def main():
    ids = [app.enqueue("image:resize", payload) for payload in (
        {"path": "cat.jpg", "width": 640}, {"path": "cat.jpg"}, {"path": "cat.jpg", "width": "wide"}, {"path": "cat.jpg", "width": 0},
        {"path": "cat.jpg", "width": 640, "colour": "blue"}, ["cat.jpg"])]
    app.start()
    for task_id in ids:
        while (task := app.get(task_id))["status"] not in ("completed", "dead_letter"):
            threading.Event().wait(0.05)
        print(task["status"], task["result"] or task["last_error"], flush=True)
    app.stop()


if __name__ == "__main__":
    main()
