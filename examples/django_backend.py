"""A backend for Django's tasks, over Django's own connection: for Django 6, or 5.2 with the package django-tasks.

    TASKS = {"default": {"BACKEND": "django_backend.OrchestratorBackend", "OPTIONS": {"database": "default"}}}

Copy examples/django_backend.py into a project; examples/django_project.py is a small one. Its workers are
`python orchestrator.py --handlers worker.py`, where worker.py calls django.setup() and has HANDLERS = {"django:": run}.
The type is django:QUEUE:PATH, so that workers, limits and pauses may name a queue by "django:emails:*". Failed attempts are repeated.
"""
import json
import re
from uuid import UUID

from django.db import close_old_connections, connections
from django.utils.dateparse import parse_datetime
from django.utils.module_loading import import_string

try:
    from django.tasks import TaskContext, TaskResult, TaskResultStatus, exceptions, signals
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.base import TaskError
except ImportError:   # Django 5.2
    from django_tasks import TaskContext, TaskResult, TaskResultStatus, exceptions, signals
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.base import TaskError

STATUSES = {"completed": "SUCCESSFUL", "dead_letter": "FAILED", "cancelled": "FAILED", "claimed": "RUNNING", "running": "RUNNING"}


class OrchestratorBackend(BaseTaskBackend):
    supports_defer = supports_async_task = supports_get_result = supports_priority = True

    def call(self, query, *parameters):
        with connections[self.options.get("database", "default")].cursor() as cursor:   # in its transaction, if there is one
            cursor.execute(query, parameters)
            return cursor.fetchone()[0]

    def enqueue(self, task, args, kwargs):
        self.validate_task(task)
        kind, payload = f"django:{task.queue_name}:{task.module_path}", json.dumps({"args": args, "kwargs": kwargs})
        task_id = self.call("select orchestrator.enqueue(%s, %s::jsonb, %s, p_run_at => %s)", kind, payload, task.priority, task.run_after)
        result = self.get_result(task_id)
        signals.task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id):
        try:
            found = json.loads(self.call("select orchestrator.get_task(%s)::text", str(UUID(str(result_id)))) or "null")
            queue, path = re.fullmatch("django:(.*?):(.*)", found["type"]).groups()
        except (TypeError, ValueError, AttributeError):   # no id, nothing there, or another kind of task
            raise exceptions.TaskResultDoesNotExist(result_id) from None
        started, ended = (parse_datetime(at or "") for at in (found["started_at"], found["completed_at"] or found["dead_at"]))
        attempts = found["attempts"] + (found["status"] == "claimed")   # counted a moment after it began
        failures = [event["detail"] or "" for event in found["events"] if event["event"] == "failed"]
        result = TaskResult(
            task=import_string(path).using(queue_name=queue, priority=found["priority"], backend=self.alias), backend=self.alias,
            id=str(found["id"]), args=found["payload"]["args"], kwargs=found["payload"]["kwargs"], started_at=started, finished_at=ended,
            status=TaskResultStatus(STATUSES.get(found["status"], "READY")), enqueued_at=parse_datetime(found["created_at"]),
            last_attempted_at=started, worker_ids=[found["worker_id"] or ""] * attempts,
            errors=[TaskError(exception_class_path="builtins.Exception", traceback=text) for text in failures])   # its class isn't kept
        object.__setattr__(result, "_return_value", found["result"])   # as Django's own backends do
        return result


def run(task):   # the handler of "django:"
    try:
        job = import_string(task.type.split(":", 2)[2])
        context = [TaskContext(task_result=job.get_backend().get_result(task.id))] if job.takes_context else []
        return job.call(*context, *task.payload["args"], **task.payload["kwargs"])
    finally:
        close_old_connections()   # as Django does after each request
