"""Models and checkpoints over HTTP."""

from __future__ import annotations

import hashlib

import pytest
from asking import ended, job_body, make_model, steps, submit

import fitrl


def test_a_name_is_taken_once_and_can_be_asked_for(server) -> None:
    with server.client() as client:
        made = make_model(client, "taken")
        body = {"project": "tests", "name": "taken", "base_model": "tiny"}
        again = client.post("/preview/models", json=body)
        assert again.status_code == 409 and "return_existing" in again.json()["detail"]
        assert make_model(client, "taken", return_existing=True) == made
        other = client.post("/preview/models", json=body | {"return_existing": True, "lora": False})
        assert other.status_code == 409 and "lora" in other.json()["detail"]


def test_two_owners_may_use_one_name(server) -> None:
    with server.client("alice") as alice, server.client("bob") as bob:
        assert make_model(alice, "same") != make_model(bob, "same")


@pytest.mark.parametrize("base", ["/etc", "../tiny", "meta-llama/Llama-3.2-1B", "file:///etc", "Tiny", "tiny/", "."])
def test_only_listed_base_models_are_loaded(server, base) -> None:
    with server.client() as client:
        answer = client.post("/preview/models", json={"project": "tests", "name": "x", "base_model": base})
    assert answer.status_code == 403
    assert answer.json()["detail"] == "base_model must be one of this server's: tiny"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "a\n", "a b", "x" * 129, "\u00e4"])
def test_no_name_is_a_path(server, name) -> None:
    with server.client() as client:
        for place in ("name", "project"):
            body = {"project": "tests", "name": "fine", "base_model": "tiny", place: name}
            assert client.post("/preview/models", json=body).status_code == 422


def test_an_entity_is_the_keys_owner(server) -> None:
    with server.client() as client:
        body = {"project": "tests", "name": "mine", "base_model": "tiny"}
        assert client.post("/preview/models", json=body | {"entity": "bob"}).status_code == 403
        assert client.post("/preview/models", json=body | {"entity": "alice"}).json()["entity"] == "alice"


def test_checkpoints_are_listed_loaded_and_deleted(server, tmp_path) -> None:
    with server.client() as client:
        model = make_model(client, "checkpoints")
        for _ in range(3):
            assert ended(client, submit(client, job_body(model)))["status"] == "succeeded"
        address = f"/preview/models/{model}/checkpoints"
        first = client.get(address, params={"limit": 2}).json()
        assert [item["step"] for item in first["data"]] == [0, 1] and first["has_more"]
        rest = client.get(address, params={"limit": 2, "after": first["last_id"]}).json()
        assert [item["step"] for item in rest["data"]] == [2, 3] and not rest["has_more"]
        (newest,) = client.get(address, params={"limit": 1, "order": "desc"}).json()["data"]
        assert newest["step"] == 3 and newest["metrics"]["reward/mean"] == 0.5
        assert client.get(address, params={"after": "nothing"}).status_code == 404

        files = client.get(f"{address}/2/files").json()["data"]
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {f["name"] for f in files}
        assert not [file for file in files if file["name"].endswith((".pt", ".bin", ".pkl"))]  # no pickle leaves
        for file in files:
            content = client.get(f"{address}/2/files/{file['name']}").content
            assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size"], file["sha256"])
            (tmp_path / file["name"]).write_bytes(content)
        from peft import PeftModel

        network = fitrl.policy.loading.load_policy("tiny").network
        assert PeftModel.from_pretrained(network, str(tmp_path)).peft_config["default"].r == 8

        kept = client.request("DELETE", address, json={"steps": [1, 3]})
        assert kept.status_code == 409 and "step 3 is the newest" in kept.json()["detail"]
        gone = client.request("DELETE", address, json={"steps": [1, 2, 7]})
        assert gone.json() == {"deleted_count": 2, "not_found_steps": [7]}
        assert steps(client, model) == [0, 3]
        assert client.get(f"{address}/2/files").status_code == 404
        assert ended(client, submit(client, job_body(model)))["step"] == 4


@pytest.mark.parametrize("name", ["trainer_state.pt", "fitrl.json", "..%2F..%2Fserve.sqlite", "%2Fetc%2Fpasswd", "x"])
def test_no_other_file_is_read(server, name) -> None:
    with server.client() as client:
        model = make_model(client, "files", return_existing=True)
        if steps(client, model) == [0]:
            ended(client, submit(client, job_body(model)))
        assert client.get(f"/preview/models/{model}/checkpoints/1/files/{name}").status_code == 404
        assert client.get(f"/preview/models/{model}/checkpoints/0/files/{name}").status_code == 404


def test_a_deleted_model_is_gone(server) -> None:
    with server.client() as client:
        model = make_model(client, "deleted")
        job = submit(client, job_body(model))
        assert ended(client, job)["status"] == "succeeded"
        folder = server.state / "models" / model
        assert folder.is_dir()
        assert client.delete(f"/preview/models/{model}").json() == {
            "model_id": model,
            "deleted_checkpoints": 1,
            "deleted_run": True,
        }
        assert not folder.exists()
        for address in (f"/preview/models/{model}/checkpoints", f"/preview/training-jobs/{job}"):
            assert client.get(address).status_code == 404
        anew = make_model(client, "deleted")
        assert anew != model and steps(client, anew) == [0]
        assert ended(client, submit(client, job_body(anew)))["step"] == 1


def test_logged_trajectories_are_in_the_run_folder(server) -> None:
    with server.client() as client:
        model = make_model(client, "logged")
        import json

        from fitrl_serverless import wire
        from helpers import group

        sent = group([0, 1])
        body = wire.LogGroups(model_id=model, trajectory_groups=wire.groups_to_wire([sent]), split="val")
        content = json.loads(body.model_dump_json())
        answers = [
            client.post(f"/preview/models/{model}/log", json=content, headers={"idempotency-key": "l1"})
            for _ in range(2)
        ]
        assert [(answer.status_code, answer.text) for answer in answers] == [(200, "null")] * 2
        elsewhere = client.post(f"/preview/models/{model}/log", json=content | {"model_id": "model-1"})
        assert elsewhere.status_code == 422
    run = fitrl.TrainableModel(model, "models", "tiny", root=server.state)
    assert [kept.to_json() for kept in run.trajectories(split="val")] == [sent.to_json()]
