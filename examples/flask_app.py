"""Flask with psycopg: each request has a connection, and with it a transaction, of its own.

    pip install flask; python examples/flask_app.py [PORT]
    curl -d customer=Ada localhost:8000/orders      {"order": 1, "task": "…"}
    curl localhost:8000/orders/1                    {"customer": "Ada", "status": "confirmed"}
"""
import sys
from pathlib import Path

import psycopg
from flask import Flask, abort, g, request
from psycopg.rows import dict_row
from werkzeug.serving import make_server

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Orchestrator

app = Orchestrator()
web = Flask(__name__)


@app.handler("flask:confirm", max_retries=5)
def confirm(task):
    with task.transaction() as connection:   # the order is confirmed and the task completed in one commit
        connection.execute("update flask_orders set status = 'confirmed' where id = %s", [task.payload["order"]])


def database():
    """The request's connection; its transaction begins with the first statement."""
    if "connection" not in g:
        g.connection = psycopg.connect(app.config.database_url, row_factory=dict_row)
    return g.connection


@web.after_request
def commit(response):
    if "connection" in g and response.status_code < 400:
        g.connection.commit()   # before the response is sent
    return response


@web.teardown_request
def close(error):
    if "connection" in g:
        g.pop("connection").close()   # rolls back what was not committed


@web.post("/orders")
def place():
    order = database().execute("insert into flask_orders (customer) values (%s) returning id", [request.form["customer"]]).fetchone()["id"]
    task = app.enqueue("flask:confirm", {"order": order}, connection=database())
    if not request.form["customer"]:
        abort(400, "an order needs a customer")   # and both are undone
    return {"order": order, "task": task}, 201


@web.get("/orders/<int:order>")
def show(order):
    return database().execute("select customer, status from flask_orders where id = %s", [order]).fetchone() or abort(404)


if __name__ == "__main__":
    app.start()   # a worker in this process; it could as well be another one, on the same database
    with psycopg.connect(app.config.database_url) as connection:
        connection.execute("create table if not exists flask_orders (id serial primary key, customer text, status text default 'new')")
    server = make_server("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 8000, web, threaded=True)
    print(f"http://127.0.0.1:{server.server_port}/orders", flush=True)
    server.serve_forever()   # until Ctrl-C
    app.stop()
