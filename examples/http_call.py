"""Call a URL until it answers. Temporary errors are retried, after the time that Retry-After asks for; permanent errors are not.

    python examples/http_call.py URL…
"""
import email.utils
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Discard, Orchestrator, Retry

app = Orchestrator(metrics_port=0)


def retry_after(value):
    """Seconds, or None for the backoff of the policy. The header holds a number of seconds or a date."""
    if not value:
        return None
    try:
        seconds = float(value) if value.isdigit() else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), 86400.0)


@app.handler("http:get", max_retries=8, base_delay=0.5, max_delay=300, timeout=60)
def get(task):
    url = task.payload["url"]
    if not url.startswith(("http://", "https://")):
        raise Discard("url: must be http or https")
    # the task's id as a key lets the other side tell a retry from a second request
    request = urllib.request.Request(url, headers={"Idempotency-Key": task.id})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return {"status": answer.status, "bytes": len(answer.read(1_000_000))}
    except urllib.error.HTTPError as error:
        if error.code in (408, 425, 429) or error.code >= 500:
            raise Retry(f"HTTP {error.code}", after=retry_after(error.headers["Retry-After"])) from None
        raise Discard(f"HTTP {error.code}") from None
    # a refused or broken connection is an exception like any other: the attempt fails and is retried with backoff


def main():
    ids = [app.enqueue("http:get", {"url": url}) for url in sys.argv[1:]]
    app.start()
    for task_id in ids:
        while (task := app.get(task_id))["status"] not in ("completed", "dead_letter"):
            threading.Event().wait(0.05)
        print(task["payload"]["url"], task["status"], f"attempts={task['attempts']}", task["result"] or task["last_error"], flush=True)
    app.stop()


if __name__ == "__main__":
    main()
