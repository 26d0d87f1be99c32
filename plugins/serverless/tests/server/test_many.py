"""Many clients at once, jobs that are sent twice: none is lost, none is doubled.

Fifty clients and two hundred jobs with FITRL_TEST_LONG, ten clients without.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from asking import LONG, ended, events, job_body, make_model, steps, submit

from fitrl_serverless.server.database import Database

CLIENTS, JOBS = 50 if LONG else 10, 4


@pytest.mark.slow
def test_many_clients_with_many_jobs(serve) -> None:
    server = serve("--max-jobs", "1000")

    def work(number: int) -> tuple[list[str], list[int]]:
        owner = "alice" if number % 2 else "bob"
        with server.client(owner) as client:
            model = make_model(client, f"client{number}")
            body = job_body(model)
            jobs = [submit(client, body, key=f"{number}-{i}") for i in range(JOBS)]
            assert [submit(client, body, key=f"{number}-{i}") for i in range(JOBS)] == jobs
            assert [ended(client, job)["step"] for job in jobs] == [1, 2, 3, 4]
            for job in jobs:
                kinds = [event["type"] for event in events(client, job)]
                assert kinds == ["training_started", "gradient_step", "training_ended"]
            return jobs, steps(client, model)

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(work, range(CLIENTS)))
    assert len({job for jobs, _ in found for job in jobs}) == CLIENTS * JOBS
    assert all(made == [0, 1, 2, 3, 4] for _, made in found)
    database = Database(server.state / "serve.sqlite")
    try:
        counts = database.rows("SELECT status, attempts, count(*) AS n FROM jobs GROUP BY status, attempts")
        assert [tuple(row) for row in counts] == [("succeeded", 1, CLIENTS * JOBS)]
    finally:
        database.close()
