"""Enqueues in the transaction of what a program uses already: a SQLAlchemy session, or an async connection of any driver.

    pip install sqlalchemy; python examples/other_drivers.py

The order and its task are committed together, or neither is. Whoever has psycopg underneath passes that connection to enqueue();
everybody else calls the SQL function, as they call any other.
"""
import asyncio
import sys
from pathlib import Path

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy import cast, create_engine, func, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Orchestrator

app = Orchestrator()


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]


def place(session: Session, customer: str) -> str:
    """With psycopg underneath: enqueue() on the session's own connection, and so in its transaction."""
    order = Order(customer=customer)
    session.add(order)
    session.flush()   # so that it has its id
    return app.enqueue("order:confirm", {"order": order.id}, connection=session.connection().connection.driver_connection)


def place_by_sql(session: Session, customer: str) -> str:
    """With any driver: the SQL function. `await session.execute(…)` does the same on an AsyncSession."""
    order = Order(customer=customer)
    session.add(order)
    session.flush()
    return str(session.scalar(select(func.orchestrator.enqueue("order:confirm", cast({"order": order.id}, JSONB)))))


async def place_async(customer: str) -> None:
    async with await psycopg.AsyncConnection.connect(app.config.database_url) as connection:
        placed = await connection.execute("insert into orders (customer) values (%s) returning id", [customer])
        order = await placed.fetchone()
        await connection.execute("select orchestrator.enqueue('order:confirm', %s)", [Jsonb({"order": order[0]})])


def main():
    app.open()   # starts the embedded PostgreSQL if DATABASE_URL is not set, and installs its schema
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(app.config.database_url))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        place(session, "Ada")
        place_by_sql(session, "Bob")
        session.commit()
        place(session, "Eve")
        place_by_sql(session, "Eve")
        session.rollback()
    asyncio.run(place_async("Cy"))
    with Session(engine) as session:
        print("orders of", ", ".join(session.scalars(select(Order.customer).order_by(Order.id))))
    with psycopg.connect(app.config.database_url) as connection:
        print("tasks", connection.execute("select count(*) from orchestrator.tasks where type = 'order:confirm'").fetchone()[0])
    engine.dispose()
    app.close()


if __name__ == "__main__":
    main()
