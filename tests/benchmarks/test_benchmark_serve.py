"""The page of a server's throughput, of figures that are made up."""

import asyncio
import json

import pytest
from serve import ALONE, ROWS, Timed, figures, page, post


def test_ratios_are_of_the_same_round_and_times_of_one_by_one() -> None:
    found = {way: [Timed([0.1] * 10, 1.0), Timed([0.1] * 10, 2.0)] for way in ROWS}
    found["64 clients"] = [Timed([0.4] * 98 + [2.0] * 3, 1.0), Timed([0.4] * 80, 2.0)]
    made = figures(found)
    assert made[ALONE]["throughput"]["median"] == made["1 client"]["throughput"]["median"] == 1
    assert made["64 clients"]["throughput"]["ratios"] == [10.1, 8.0] and made["64 clients"]["answers"] == 181
    assert made["64 clients"]["p50"] == pytest.approx(4) and made["64 clients"]["p99"] == pytest.approx(20)
    text = page({"Whole questions": made}, {"command": "python benchmarks/serve.py"})
    assert "| 64 clients | 9.05 (8.00 to 10.10) | 4.00 | 20.00 | 181 |" in text and "| one by one | 1.00 " in text


def test_an_answer_that_is_none_is_no_answer() -> None:
    async def asked(status: str) -> object:
        async def answer(into: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
            await into.readuntil(b"\r\n\r\n")
            body = json.dumps({"data": [{"label": "red"}]})
            out.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
            await out.drain()
            out.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            into, out = await asyncio.open_connection(*server.sockets[0].getsockname())
            try:
                return await post(into, out, {"input": "red"})
            finally:
                out.close()

    assert asyncio.run(asked("200")) == {"data": [{"label": "red"}]}
    with pytest.raises(AssertionError):
        asyncio.run(asked("503"))
