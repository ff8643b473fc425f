"""A TCP proxy that fails like a network: silent, or losing one reply on purpose (a COMMIT acknowledged to nobody)."""
from __future__ import annotations

import asyncio
import contextlib
import threading


class Proxy:
    """Listens on 127.0.0.1:port and forwards to 127.0.0.1:target; a thread of its own runs it.

    silence()        nothing passes any more on the connections there are, nor on new ones
    pass_again()     everything passes; what was held back arrives (forget=True: the old connections stay silent for ever)
    lose_reply(text) once a client has sent `text`, the server's answer is dropped and the connection cut; only an answer of at least
                     `least` bytes, since a shorter one says that nothing was done
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay = 0.0                  # seconds that what clients send is held back, as by a distance
        self.lost = 0                     # replies that nobody got
        self._silent = False
        self._generation = 0              # connections older than this are silent for ever
        self._lose: bytes | None = None
        self._least = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()
        self._ready.wait(10)

    def silence(self) -> None:
        self._silent = True

    def pass_again(self, forget: bool = False) -> None:
        self._generation += forget
        self._silent = False

    def lose_reply(self, text: str | None, least: int = 0) -> None:
        self._least = least
        self._lose = text.encode() if text else None

    @property
    def armed(self) -> bool:
        return self._lose is not None

    def close(self) -> None:
        self._silent = False
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        generation = self._generation
        while self._silent:
            await asyncio.sleep(0.05)
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        state = {"losing": False}
        with contextlib.suppress(asyncio.CancelledError):   # close()
            await asyncio.gather(self._pump(reader, to_server, state, generation, False),
                                 self._pump(from_server, writer, state, generation, True))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict[str, bool],
                    generation: int, answer: bool) -> None:
        try:
            while data := await reader.read(65536):
                while self._silent or generation != self._generation:
                    await asyncio.sleep(0.05)
                if answer and state["losing"] and len(data) < self._least:
                    state["losing"] = False
                if answer and state["losing"]:   # the server has answered, so it has committed
                    self.lost += 1
                    self._lose = None
                    break
                if not answer and self._lose is not None:
                    state["losing"] = self._lose in data
                if not answer and self.delay:
                    self._loop.call_later(self.delay, _write, writer, data)
                    continue
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            if answer and state["losing"]:
                writer.transport.abort()
            writer.close()


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not writer.is_closing():
        writer.write(data)
