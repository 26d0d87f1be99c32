"""A foreign service: the published API and nothing of fitrl's own, over a real socket, with faults on demand."""

from __future__ import annotations

import json
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

KEY = "secret-of-the-tests"


class ForeignService:
    """Models, jobs and events in memory; each job "trains" at once, and its events tell what was sent.

    Attributes:
        faults: what happens to the next requests whose path ends so: a status, "drop" (the connection breaks before
            the request is looked at) or "drop-after" (after it was carried out).
        seen: method, path, headers and body of every request that was looked at.
        script: the events of jobs to come, instead of a step that succeeds.
    """

    def __init__(self) -> None:
        self.faults: dict[str, deque[Any]] = {}
        self.seen: list[tuple[str, str, dict[str, str], Any]] = []
        self.models: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, list[int]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.by_key: dict[str, str] = {}
        self.script: list[dict[str, Any]] | None = None
        self.page = 100
        self.health: Any = "ok"
        self.lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def handle_any(self) -> None:
                service.handle(self)

            do_GET = do_POST = do_DELETE = handle_any

        class Listener(ThreadingHTTPServer):
            request_queue_size = 256  # many clients may knock at once

        self.http = Listener(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    # -- one request ------------------------------------------------------------------------------------------

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        address = urlsplit(request.path)
        path = address.path.removeprefix("/v1")
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        body = self.read(request)
        fault = next((queue.popleft() for end, queue in self.faults.items() if path.endswith(end) and queue), None)
        if fault == "drop":
            request.close_connection = True
            request.connection.close()
            return
        headers = {"X-Request-Id": "of-the-service"}
        if isinstance(fault, tuple):
            status, answer, extra = fault
            headers |= extra
        elif isinstance(fault, int):
            status, answer = fault, {"error": {"message": f"scripted {fault}"}}
        else:
            with self.lock:
                said = {name.lower(): value for name, value in request.headers.items()}
                self.seen.append((request.command, path, said, body))
                status, answer = self.answer(request, path, query, body)
        if fault == "drop-after":
            request.close_connection = True
            request.connection.close()
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)

    def read(self, request: BaseHTTPRequestHandler) -> Any:
        if request.headers.get("Transfer-Encoding") == "chunked":
            raw = b""
            while size := int(request.rfile.readline().strip() or b"0", 16):
                raw += request.rfile.read(size)
                request.rfile.readline()
            request.rfile.readline()
        else:
            raw = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        try:
            return json.loads(raw) if raw else None
        except ValueError:
            return raw

    def answer(self, request: Any, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if path == "/health":
            return 200, self.health
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return 401, {"detail": f"wrong key {request.headers.get('Authorization')}"}
        if request.headers.get("Content-Encoding"):
            return 415, {"detail": "no encodings here"}
        parts = path.strip("/").split("/")
        match request.command, parts:
            case "POST", ["preview", "models"]:
                name = f"{body.get('entity') or 'me'}-{body['project']}-{body['name']}"
                model = {"id": name, "entity": body.get("entity") or "me", "run_id": None}
                model |= {key: body[key] for key in ("project", "name", "base_model")}
                self.steps.setdefault(name, [])
                return 200, self.models.setdefault(name, model)
            case "GET", ["preview", "models", model_id, "checkpoints"]:
                steps = sorted(self.steps[model_id], reverse=query.get("order") == "desc")
                items = [{"id": f"c{step}", "step": step, "metrics": {"reward/mean": 1}} for step in steps]
                return 200, self.paged(items, query)
            case "DELETE", ["preview", "models", model_id, "checkpoints"]:
                gone = [step for step in body["steps"] if step in self.steps[model_id]]
                self.steps[model_id] = [step for step in self.steps[model_id] if step not in gone]
                missing = [step for step in body["steps"] if step not in gone]
                return 200, {"deleted_count": len(gone), "not_found_steps": missing}
            case "POST", ["preview", "models", _, "log"]:
                return 200, None
            case "POST", ["preview", "training-jobs"]:
                return 200, {"id": self.create(body, request.headers.get("Idempotency-Key"))}
            case "GET", ["preview", "training-jobs", job_id, "events"] if job_id in self.jobs:
                return 200, self.paged(self.jobs[job_id]["events"], query)
            case "GET", ["preview", "training-jobs", job_id] if job_id in self.jobs:
                return 200, {"id": job_id, "status": self.jobs[job_id]["status"]}
            case "POST", ["chat", "completions"]:
                return 200, self.chat(body)
        return 404, {"detail": f"nothing at {path}"}

    def create(self, body: Any, key: str | None) -> str:
        if key in self.by_key:
            return self.by_key[key]
        job_id = f"job-{len(self.jobs)}"
        script = self.script
        if script is None:
            step = {"loss/train": 0.5, "loss/grad_norm": 2.0, "loss/learning_rate": 0.0, "note": "text"}
            step["loss/learning_rate"] = body["experimental_config"]["learning_rate"]
            script = [
                {"type": "training_started", "data": {"num_sequences": 1}},
                {"type": "gradient_step", "data": step},
                {"type": "training_ended", "data": {}},
            ]
        events = [{"id": f"e{number}"} | event for number, event in enumerate(script)]
        if any(event["type"] == "training_ended" for event in events):
            self.steps[body["model_id"]].append(max(self.steps[body["model_id"]], default=0) + 1)
        self.jobs[job_id] = {"events": events, "status": "IN_PROGRESS", "body": body}
        if key is not None:
            self.by_key[key] = job_id
        return job_id

    def paged(self, items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        ids = [item["id"] for item in items]
        start = ids.index(query["after"]) + 1 if "after" in query else 0
        size = min(self.page, int(query.get("limit", 20)))
        data = items[start : start + size]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": start + size < len(items),
        }

    def chat(self, body: Any) -> dict[str, Any]:
        content = [{"token": f"token_id:{ord(letter)}", "logprob": -0.25, "bytes": None} for letter in "7"]
        choice = {
            "finish_reason": "stop",
            "logprobs": {"content": content, "refusal": None},
            "message": {"role": "assistant", "content": "7", "refusal": None},
        }
        choices = [choice | {"index": index} for index in range(body.get("n", 1))]
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"]}
        return answer | {"choices": choices, "usage": usage, "system_fingerprint": None}


@pytest.fixture
def foreign():
    service = ForeignService()
    yield service
    service.close()


@pytest.fixture
def key() -> str:
    return KEY
