"""A plain asyncio program: it enqueues while its event loop goes on, and its handlers are coroutines.

    python examples/asyncio_program.py
"""
import asyncio
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Orchestrator

app = Orchestrator(metrics_port=0, worker_pool_size=4)


@app.handler("page:fetch", timeout=30)
async def fetch(task):
    """Runs on the worker's own event loop, in a thread beside the program's; up to WORKER_POOL_SIZE at once."""
    await asyncio.sleep(0.1)   # such as a request
    if task.payload["links"]:
        await app.enqueue_async("page:fetch", {"url": task.payload["url"] + "/next", "links": task.payload["links"] - 1})
    return f"{task.payload['url']} by {threading.current_thread().name}"


async def main():
    await asyncio.to_thread(app.start)   # and everything else that asks the database
    try:
        ids = await asyncio.gather(*(app.enqueue_async("page:fetch", {"url": f"/{page}", "links": 1}, max_retries=5) for page in "abcd"))
        for result in await asyncio.to_thread(app.wait_all, ids):
            print("completed", result, flush=True)
    finally:
        await asyncio.to_thread(app.stop)


if __name__ == "__main__":
    asyncio.run(main())
