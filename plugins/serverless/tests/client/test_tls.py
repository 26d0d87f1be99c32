"""`fitrl serve` with a certificate, over TLS: the client checks it, by public authorities or by one that it is told."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pytest

import fitrl
from fitrl.errors import InvalidArgumentError
from fitrl_serverless import ServerlessTrainer
from fitrl_serverless.client import Connection, UntrustedError
from helpers import group


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """An authority (ca.pem), and what it signed for 127.0.0.1 (chain.pem, key.pem); a second authority (other.pem)."""
    folder = tmp_path_factory.mktemp("certificates")
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    for name in ("ca", "other"):
        openssl(folder, *new, "-subj", f"/CN={name}", "-keyout", f"{name}-key.pem", "-out", f"{name}.pem")
    signed = ["-CA", "ca.pem", "-CAkey", "ca-key.pem", "-addext", "basicConstraints=critical,CA:FALSE"]
    named = ["-subj", "/CN=serve", "-addext", "subjectAltName=IP:127.0.0.1"]
    openssl(folder, *new, *signed, *named, "-keyout", "key.pem", "-out", "chain.pem")
    return folder


@pytest.fixture
def secure(serve, certificates):
    server = serve("--ssl-certfile", str(certificates / "chain.pem"), "--ssl-keyfile", str(certificates / "key.pem"))
    assert server.url.startswith("https://127.0.0.1:")
    return server


@pytest.mark.slow
def test_training_and_sampling_over_tls(secure, certificates, tmp_path, monkeypatch) -> None:
    key = secure.keys["alice"]
    model = fitrl.TrainableModel("policy", "tls", "tiny", lora=None, root=tmp_path)
    with ServerlessTrainer(url=secure.url, key=key, ca_file=certificates / "ca.pem") as trainer:
        groups = fitrl.rollout(trainer.sampler(model), ["3+4="], reward=lambda task, t: 0.0, group_size=2)
        assert len(groups[0]) == 2
        assert trainer.fit_rl(model, [group([0, 1])], learning_rate=1e-3).step == 1
        assert (trainer.download_checkpoint(model) / "model.safetensors").is_file()
    for wrong in ({}, {"ca_file": certificates / "other.pem"}):
        with ServerlessTrainer(url=secure.url, key=key, **wrong) as trainer:
            with pytest.raises(
                UntrustedError, match=r"not trusted: .*pass ca_file="
            ) as caught:  # at once, not in minutes
                trainer.open(model)
            assert key not in str(caught.value)
    with (
        ServerlessTrainer(
            url=secure.url.replace("127.0.0.1", "localhost"), key=key, ca_file=certificates / "ca.pem"
        ) as t,
        pytest.raises(UntrustedError, match="localhost"),
    ):
        t.open(model)  # trusted, and not of this name
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    with ServerlessTrainer(url=secure.url, key=key) as trainer:
        trainer.open(model)
        assert model.step == 1
    with pytest.raises(httpx.TransportError):  # no plain HTTP on this port
        httpx.get(secure.url.replace("https", "http"))


def test_certificates_that_cannot_be_used(certificates, tmp_path) -> None:
    (tmp_path / "empty.pem").touch()
    for file in ("missing.pem", "empty.pem"):
        with pytest.raises(InvalidArgumentError, match="holds no certificates in PEM"):
            Connection("https://127.0.0.1:1", "k", ca_file=tmp_path / file)
    with pytest.raises(InvalidArgumentError, match="has no effect on http"):
        Connection("http://127.0.0.1:1", "k", ca_file=certificates / "ca.pem")
