"""A web application that enqueues in its own transaction: an order and the task that confirms it are stored together, or neither is.

    python examples/web_app.py [PORT]
    curl -d '{"customer": "Ada"}' localhost:8000/orders        {"order": 1, "task": "…"}
    curl localhost:8000/orders/1                               {"customer": "Ada", "status": "confirmed"}
"""
import http.server
import json
import re
import sys
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Orchestrator

app = Orchestrator()


@app.handler("shop:confirm", max_retries=5)
def confirm(task):
    """The slow part, such as an e-mail; the customer doesn't wait for it."""
    with task.transaction() as connection:   # the order is confirmed and the task completed in one commit
        connection.execute("update shop_orders set status = 'confirmed' where id = %s", [task.payload["order"]])


class Shop(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        try:
            customer = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["customer"]
            with psycopg.connect(app.config.database_url) as connection:   # commits at its end, rolls back on an exception
                row = connection.execute("insert into shop_orders (customer) values (%s) returning id", [customer]).fetchone()
                task = app.enqueue("shop:confirm", {"order": row[0]}, connection=connection)
        except (KeyError, TypeError, ValueError, psycopg.errors.IntegrityError) as error:
            return self.answer(400, {"error": str(error).split("\n")[0]})
        return self.answer(201, {"order": row[0], "task": task})

    def do_GET(self):
        found = re.fullmatch(r"/orders/(\d{1,9})", self.path)
        with psycopg.connect(app.config.database_url) as connection:
            row = found and connection.execute("select customer, status from shop_orders where id = %s", [found[1]]).fetchone()
        return self.answer(200, {"customer": row[0], "status": row[1]}) if row else self.answer(404, {"error": "no such order"})

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode() + b"\n")


def main():
    app.start()   # a worker in this process; it could as well be another one, on the same database
    with psycopg.connect(app.config.database_url) as connection:
        connection.execute("""create table if not exists shop_orders (
            id bigint generated always as identity primary key, customer text not null check (customer <> ''),
            status text not null default 'new')""")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 8000), Shop)
    print(f"http://127.0.0.1:{server.server_port}/orders", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        app.stop()


if __name__ == "__main__":
    main()
