"""Django's tasks, run by the orchestrator: an order and the task that confirms it are stored by one transaction.atomic(), or neither is.

    python examples/django_project.py    # after pip install 'django>=6', or 'django>=5.2,<6' django-tasks

A project has the settings in settings.py, the @task in tasks.py, and workers as examples/django_backend.py tells.
"""
import contextlib
import sys
import time
from pathlib import Path

import django
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Orchestrator

app = Orchestrator(metrics_port=0)
app.open()   # starts the embedded PostgreSQL if DATABASE_URL is not set, and installs the schema
address = conninfo_to_dict(app.config.database_url)
settings.configure(
    USE_TZ=True,
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": address["dbname"],
                           **{name: address.get(name.lower()) for name in ("USER", "PASSWORD", "HOST", "PORT")}}},
    TASKS={"default": {"BACKEND": "django_backend.OrchestratorBackend", "QUEUES": ["default", "emails"]}})
django.setup()

from django.db import connection, transaction  # noqa: E402
from django_backend import run  # noqa: E402

try:
    from django.tasks import task
except ImportError:   # Django 5.2
    from django_tasks import task


@task(queue_name="emails", priority=5, takes_context=True)
def confirm(context, order, *, language="en"):
    with connection.cursor() as cursor:
        cursor.execute("update django_orders set status = 'confirmed' where id = %s returning customer", [order])
        return f"{cursor.fetchone()[0]} in {language}, attempt {context.attempt}"


def place(customer):
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("insert into django_orders (customer) values (%s) returning id", [customer])
        result = confirm.enqueue(cursor.fetchone()[0], language="de")
        if not customer:
            raise ValueError("an order needs a customer")   # and both are undone
    return result


def main():
    with connection.cursor() as cursor:
        cursor.execute("create table if not exists django_orders (id serial primary key, customer text, status text default 'new')")
    app.handler("django:", run, max_retries=5)
    app.start()   # a worker in this process; it could as well be another one, on the same database
    result = place("Ada")
    with contextlib.suppress(ValueError):
        place("")
    while not result.is_finished:
        time.sleep(0.05)
        result.refresh()
    print("confirmed:", result.return_value, flush=True)
    app.stop()


if __name__ == "__main__":
    main()
