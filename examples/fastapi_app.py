"""FastAPI with SQLAlchemy's async session: the request's own transaction holds an order and the task that confirms it, or neither.

    pip install fastapi uvicorn sqlalchemy greenlet; python examples/fastapi_app.py [PORT]
    curl --json '{"customer": "Ada"}' localhost:8000/orders     {"order": 1, "task": "…"}
    curl localhost:8000/orders/1                                {"customer": "Ada", "status": "confirmed"}
"""
import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Annotated

import psycopg
import uvicorn
from fastapi import Body, Depends, FastAPI, HTTPException
from sqlalchemy import cast, func, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Orchestrator

app = Orchestrator()
engine = create_async_engine("postgresql+psycopg://", async_creator=lambda: psycopg.AsyncConnection.connect(app.config.database_url))


@app.handler("fastapi:confirm", max_retries=5)
async def confirm(task):
    async with AsyncSession(engine) as session, session.begin():
        await session.execute(text("update fastapi_orders set status = 'confirmed' where id = :order"), task.payload)


@contextlib.asynccontextmanager
async def lifespan(api):
    await asyncio.to_thread(app.start)   # a worker in this process; it could as well be another one, on the same database
    async with engine.begin() as connection:
        await connection.execute(text("create table if not exists fastapi_orders (id serial, customer text, status text default 'new')"))
    yield
    await asyncio.to_thread(app.stop)


async def transaction():
    async with AsyncSession(engine) as session, session.begin():   # commits when the endpoint returns, rolls back if it raises
        yield session


api = FastAPI(lifespan=lifespan)
Session = Annotated[AsyncSession, Depends(transaction, scope="function")]   # so it commits before the response is sent


@api.post("/orders", status_code=201)
async def place(customer: Annotated[str, Body(embed=True)], session: Session):
    order = await session.scalar(text("insert into fastapi_orders (customer) values (:customer) returning id"), {"customer": customer})
    task = await session.scalar(select(func.orchestrator.enqueue("fastapi:confirm", cast({"order": order}, JSONB))))
    if not customer:
        raise HTTPException(400, "an order needs a customer")   # and both are undone
    return {"order": order, "task": task}


@api.get("/orders/{order}")
async def show(order: int, session: Session):
    found = await session.execute(text("select customer, status from fastapi_orders where id = :order"), {"order": order})
    if (row := found.mappings().first()) is None:
        raise HTTPException(404, "no such order")
    return row


if __name__ == "__main__":
    uvicorn.run(api, port=int(sys.argv[1]) if sys.argv[1:] else 8000)
