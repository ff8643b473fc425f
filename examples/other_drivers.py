"""Enqueue in the transaction of what a program uses already: SQLAlchemy, an async psycopg connection, or asyncpg.

    pip install sqlalchemy greenlet asyncpg; python examples/other_drivers.py

A booking and its task are committed together, or neither is. `connection=` takes a psycopg connection; with everything else, call the SQL
function in the way in which the program calls any SQL. asyncpg is left out if it is not installed.
"""
import asyncio
import json
import sys
from pathlib import Path

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy import cast, create_engine, func, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

try:
    import asyncpg
except ImportError:
    asyncpg = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Orchestrator

app = Orchestrator()


class Base(DeclarativeBase):
    pass


class Booking(Base):
    __tablename__ = "bookings"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]


def sqlalchemy_on_psycopg(session: Session, booking: Booking) -> str:
    """The session's own psycopg connection, and so its transaction."""
    connection = session.connection().connection.driver_connection
    return app.enqueue("booking:confirm", {"booking": booking.id}, connection=connection)


def sqlalchemy_on_any_driver(session: Session, booking: Booking) -> str:
    enqueue = func.orchestrator.enqueue("booking:confirm", cast({"booking": booking.id}, JSONB))
    return str(session.scalar(select(enqueue)))


async def sqlalchemy_async(session: AsyncSession, booking: Booking) -> str:
    enqueue = func.orchestrator.enqueue("booking:confirm", cast({"booking": booking.id}, JSONB))
    return str(await session.scalar(select(enqueue)))


async def psycopg_async(connection: psycopg.AsyncConnection, booking: int) -> str:
    cursor = await connection.execute("select orchestrator.enqueue('booking:confirm', %s)", [Jsonb({"booking": booking})])
    return str((await cursor.fetchone())[0])


async def asyncpg_connection(connection: "asyncpg.Connection", booking: int) -> str:
    enqueue = "select orchestrator.enqueue('booking:confirm', $1::jsonb)"
    return str(await connection.fetchval(enqueue, json.dumps({"booking": booking})))


def place(session: Session, customer: str) -> Booking:
    booking = Booking(customer=customer)
    session.add(booking)
    session.flush()   # so that it has its id
    return booking


def with_sessions() -> None:
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(app.config.database_url))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        sqlalchemy_on_psycopg(session, place(session, "Ada"))
        sqlalchemy_on_any_driver(session, place(session, "Bob"))
        session.commit()
        sqlalchemy_on_psycopg(session, place(session, "Eve"))
        sqlalchemy_on_any_driver(session, place(session, "Eve"))
        session.rollback()
    engine.dispose()


async def with_async_connections() -> None:
    url, insert = app.config.database_url, "insert into bookings (customer) values ('{}') returning id"
    engine = create_async_engine("postgresql+psycopg://", async_creator=lambda: psycopg.AsyncConnection.connect(url))
    async with AsyncSession(engine) as session, session.begin():
        session.add(booking := Booking(customer="Cy"))
        await session.flush()
        await sqlalchemy_async(session, booking)
    await engine.dispose()
    async with await psycopg.AsyncConnection.connect(url) as connection:   # commits at its end
        row = await (await connection.execute(insert.format("Di"))).fetchone()
        await psycopg_async(connection, row[0])
    if asyncpg is not None:
        connection = await asyncpg.connect(url)
        async with connection.transaction():
            await asyncpg_connection(connection, await connection.fetchval(insert.format("Fay")))
        await connection.close()


def main():
    app.open()   # starts the embedded PostgreSQL if DATABASE_URL is not set, and installs the schema
    with_sessions()
    asyncio.run(with_async_connections())
    with psycopg.connect(app.config.database_url) as connection:
        customers = connection.execute("select customer from bookings order by id").fetchall()
        tasks = connection.execute("select count(*) from orchestrator.tasks where type = 'booking:confirm'").fetchone()[0]
    print("bookings of", ", ".join(name for name, in customers))
    print("tasks", tasks)
    app.close()


if __name__ == "__main__":
    main()
