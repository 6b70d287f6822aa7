"""The proxy itself: a fault that does not strike would make every test behind it worthless."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from fault_proxy import BOTH, DOWN, FaultProxy


class Echo:
    """Sends back what it gets; remembers it, connection by connection, in the order of arrival."""

    def __init__(self) -> None:
        self.got: list[tuple[int, bytes]] = []
        self.ended: list[int] = []
        self._n = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._n += 1
        number = self._n
        try:
            while data := await reader.read(1000):
                self.got.append((number, data))
                writer.write(data)
        except OSError:
            pass
        finally:
            self.ended.append(number)
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[tuple[Echo, FaultProxy]]:
    server = Echo()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with FaultProxy(listening.sockets[0].getsockname()[:2]) as proxy:
        yield server, proxy
    listening.close()


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def opened(proxy: FaultProxy) -> Ends:
    ends = await asyncio.open_connection(*proxy.address)
    assert await said(ends, b"hello") == b"hello"
    return ends


async def said(ends: Ends, text: bytes, within_s: float = 5.0) -> bytes | None:
    ends[1].write(text)
    try:
        return await asyncio.wait_for(ends[0].read(1000), within_s)
    except TimeoutError:
        return None


async def test_a_cut_ends_connections_and_lets_new_ones_through(echo: tuple[Echo, FaultProxy]) -> None:
    _, proxy = echo
    ends = await opened(proxy)
    proxy.cut(reset=True)
    with pytest.raises(ConnectionResetError):
        await said(ends, b"x")
        await said(ends, b"x")
    ends = await opened(proxy)
    proxy.cut(reset=False)
    assert await ends[0].read(10) == b""
    await opened(proxy)


async def test_refused_is_refused_until_it_accepts_again(echo: tuple[Echo, FaultProxy]) -> None:
    _, proxy = echo
    await opened(proxy)
    await proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await opened(proxy)
    await proxy.accept()
    await opened(proxy)


@pytest.mark.parametrize("directions", [BOTH, frozenset({DOWN})])
async def test_a_stall_keeps_everything_for_later(
    echo: tuple[Echo, FaultProxy], directions: frozenset[str]
) -> None:
    server, proxy = echo
    ends = await opened(proxy)
    proxy.stalled = directions
    assert await said(ends, b"x", 0.3) is None
    assert ((1, b"x") in server.got) is (directions != BOTH)
    proxy.stalled = frozenset()
    assert await asyncio.wait_for(ends[0].read(10), 5.0) == b"x"


async def test_slow_takes_its_time(echo: tuple[Echo, FaultProxy]) -> None:
    _, proxy = echo
    ends = await opened(proxy)
    proxy.latency_s = (0.1, 0.15)
    started = asyncio.get_running_loop().time()
    assert await said(ends, b"x") == b"x"
    assert 0.2 <= asyncio.get_running_loop().time() - started < 5
    proxy.latency_s, proxy.bytes_per_s = (0.0, 0.0), 2000.0
    started = asyncio.get_running_loop().time()
    assert await said(ends, b"y" * 500, 3.0)
    assert asyncio.get_running_loop().time() - started >= 0.5


async def test_half_open_tells_nobody_and_new_connections_work(echo: tuple[Echo, FaultProxy]) -> None:
    server, proxy = echo
    ends = await opened(proxy)
    proxy.half_open()
    assert await said(ends, b"lost", 0.3) is None
    ends[1].close()
    await asyncio.sleep(0.2)
    assert not server.ended and (1, b"lost") not in server.got
    await opened(proxy)


async def test_reordered_a_new_connection_overtakes_the_old_ones_last_bytes(
    echo: tuple[Echo, FaultProxy],
) -> None:
    server, proxy = echo
    ends = await opened(proxy)
    striking = asyncio.create_task(proxy.reorder(1.0))
    await asyncio.sleep(0.1)
    ends[1].write(b"last words")
    await striking
    again = await opened(proxy)
    async with asyncio.timeout(10):
        while not server.ended:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert server.got == [(1, b"hello"), (2, b"hello"), (1, b"last words")]
    assert server.ended == [1]
    again[1].close()
