"""Every argument that `LocalTrainer` and its `fit_rl` accept does something that can be seen, or raises."""

import inspect
import math
import shutil

import lightning
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import fitrl
from fitrl.data.packing import pack
from fitrl.errors import FitRLError, InvalidArgumentError, UnknownArgumentError
from fitrl.objective.linear_head import LinearHead
from fitrl.policy.plots import plot_batches
from fitrl.trainers.local import LocalTrainer
from samples import make_groups, make_samples

COMMON = {"learning_rate": 1e-3, "save_checkpoint": False}


def learn(root, *, calls=1, groups=None, trainer=None, lora=None, **kwargs):
    """Weights after some calls, and the last result."""
    model = fitrl.TrainableModel("run", "arguments", "tiny", lora=lora, root=root)
    options = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False} | (trainer or {})
    with LocalTrainer(**options) as local:
        for _ in range(calls):
            result = local.fit_rl(model, groups or make_groups(seed=1), **(COMMON | kwargs))
        weights = torch.cat([tensor.flatten() for _, tensor in local.verbs.named_weights()])
    return weights, result


# argument -> (keywords with it, keywords without it); the two must end in different weights
CHANGES_WEIGHTS = {
    "learning_rate": ({"learning_rate": 2e-3}, {}),
    "ppo": ({"ppo": True}, {}),
    "epsilon": ({"ppo": True, "epsilon": 0.01}, {"ppo": True}),
    "epsilon_high": ({"epsilon_high": 0.01}, {}),
    "advantage_balance": ({"advantage_balance": 0.5}, {}),
    "scale_rewards": ({"scale_rewards": False, "ppo": True}, {"ppo": True}),
    "importance_sampling_level": ({"importance_sampling_level": "sequence"}, {}),
    "max_negative_advantage_importance_sampling_weight": (
        {"max_negative_advantage_importance_sampling_weight": 0.9},
        {},
    ),
    "mask_prob_ratio": ({"mask_prob_ratio": True, "epsilon_high": 0.1}, {"epsilon_high": 0.1}),
    "kimi_k2_tau": ({"kimi_k2_tau": 0.5}, {}),
    "precalculate_logprobs": ({"precalculate_logprobs": True}, {}),
    "truncated_importance_sampling": (
        {"truncated_importance_sampling": 1.0, "precalculate_logprobs": True},
        {"precalculate_logprobs": True},
    ),
    "loss_aggregation": ({"loss_aggregation": "seq_mean_token_mean"}, {}),
    "num_minibatches": ({"num_minibatches": 2}, {}),
    "num_epochs": ({"num_epochs": 2}, {}),
    "seed": ({"num_minibatches": 3, "seed": 1}, {"num_minibatches": 3}),
    "norm_length": (
        {"loss_aggregation": "seq_mean_token_sum_norm", "norm_length": 5.0, "entropy_coef": 0.1},
        {"loss_aggregation": "seq_mean_token_sum", "entropy_coef": 0.1},
    ),
    "dual_clip": ({"ppo": True, "dual_clip": 1.01}, {"ppo": True}),
    "ratio_cap": ({"ppo": True, "ratio_cap": 1.201}, {"ppo": True}),
    "kl_coef": ({"kl_coef": 1.0, "reference": "base", "calls": 2}, {"calls": 2}),
    "kl_in": (
        {"kl_coef": 1.0, "reference": "base", "kl_in": "advantage", "calls": 2},
        {"kl_coef": 1.0, "reference": "base", "calls": 2},
    ),
    "kl_estimator": (
        {"kl_coef": 1.0, "reference": "base", "kl_estimator": "k3", "calls": 2},
        {"kl_coef": 1.0, "reference": "base", "calls": 2},
    ),
    "entropy_coef": ({"entropy_coef": 0.5}, {}),
    "num_trajectories_learning_rate_multiplier_power": ({"num_trajectories_learning_rate_multiplier_power": 0.5}, {}),
    "optimizer": ({"trainer": {"optimizer": fitrl.AdamWSettings(weight_decay=0.5)}}, {}),
    "lr_schedule": ({"trainer": {"lr_schedule": lambda step: 0.5}}, {}),
}


@pytest.mark.parametrize("name", CHANGES_WEIGHTS)
def test_argument_changes_what_is_learned(name, tmp_path) -> None:
    given, without = CHANGES_WEIGHTS[name]
    changed, _ = learn(tmp_path / "given", **given)
    plain, _ = learn(tmp_path / "without", **without)
    # an optimizer step moves a weight by about the learning rate; less than a thousandth of it is rounding
    assert float((changed - plain).abs().max()) > 1e-6


def test_reference_may_be_the_base_a_step_or_a_folder(tmp_path) -> None:
    model = fitrl.TrainableModel("run", "arguments", "tiny", lora=None, root=tmp_path)
    groups = make_groups(seed=1)
    kl = {}
    with LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        for _ in range(2):
            saved = trainer.fit_rl(model, groups, learning_rate=1e-3).checkpoint_path
        for reference in ("base", 2, saved):
            result = trainer.fit_rl(
                model, groups, learning_rate=0.0, kl_coef=0.1, reference=reference, save_checkpoint=False
            )
            kl[reference] = result.metrics["loss/kl"]
        with pytest.raises(FitRLError, match="there is no checkpoint folder"):
            trainer.fit_rl(model, groups, kl_coef=0.1, reference=77)
    assert kl["base"] > 1e-4
    assert kl[2] == pytest.approx(0.0, abs=1e-10)  # the newest step is the policy itself
    assert kl[saved] == pytest.approx(0.0, abs=1e-10)


def test_a_reference_folder_that_is_written_again_is_read_again(tmp_path) -> None:
    model = fitrl.TrainableModel("run", "arguments", "tiny", lora=None, root=tmp_path)
    groups, folder = make_groups(seed=1), tmp_path / "reference"
    with LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        kl = []
        for _ in range(2):
            trainer.fit_rl(model, groups, learning_rate=1e-3)
            trainer.verbs.save(path=str(folder), weights_only=True)
            for _ in range(2):
                kl.append(
                    trainer.fit_rl(
                        model, groups, learning_rate=0.0, kl_coef=0.1, reference=folder, save_checkpoint=False
                    ).metrics["loss/kl"]
                )
    assert kl == pytest.approx([0.0] * 4, abs=1e-10)  # each time the policy itself


def test_a_reference_that_cannot_be_read_is_named(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    small = Qwen3Config(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    Qwen3ForCausalLM(small).save_pretrained(tmp_path / "small")
    shutil.copytree(tmp_path / "small", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    model = fitrl.TrainableModel("run", "arguments", "tiny", lora=None, root=tmp_path)
    with LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        for name in ("empty", "cut", "adapter", "small"):
            with pytest.raises(FitRLError, match=str(tmp_path / name)):
                trainer.fit_rl(model, make_groups(seed=1), kl_coef=0.1, reference=tmp_path / name)
        with pytest.raises(InvalidArgumentError, match="reads 100 token ids, the policy 262"):
            trainer.fit_rl(model, make_groups(seed=1), kl_coef=0.1, reference=tmp_path / "small")


def test_reference_of_adapters_is_the_base_without_them(tmp_path) -> None:
    lora = fitrl.LoraSettings(rank=4)
    groups = make_groups(seed=1)
    _, before = learn(tmp_path, groups=groups, lora=lora, kl_coef=0.1, reference="base", learning_rate=0.0)
    assert before.metrics["loss/kl"] == pytest.approx(0.0, abs=1e-10)
    _, after = learn(tmp_path / "b", groups=groups, lora=lora, kl_coef=0.1, reference="base", calls=3)
    assert after.metrics["loss/kl"] > 1e-6


def test_save_checkpoint(tmp_path) -> None:
    _, saved = learn(tmp_path / "a", save_checkpoint=True)
    assert saved.checkpoint_path is not None and (saved.checkpoint_path / "model.safetensors").is_file()
    _, unsaved = learn(tmp_path / "b", save_checkpoint=False)
    assert unsaved.checkpoint_path is None and not list(tmp_path.glob("b/**/*.safetensors"))


def test_verbose_prints_a_line_per_call(tmp_path, capsys) -> None:
    learn(tmp_path / "quiet")
    assert "reward/mean" not in capsys.readouterr().err
    learn(tmp_path / "verbose", verbose=True)
    assert "local step 1  reward/mean" in capsys.readouterr().err


def test_plot_tensors_writes_a_picture(tmp_path) -> None:
    learn(tmp_path, plot_tensors=True)
    [picture] = tmp_path.glob("arguments/run/plots/*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_a_picture_of_many_microbatches_shows_the_first(tmp_path, monkeypatch) -> None:
    """With all of 160 microbatches the layout took minutes and many gigabytes."""
    from matplotlib.figure import Figure

    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text: titles.append((text, self)))
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: None)
    batches = pack(make_samples(seed=1, num_trajectories=40), max_tokens=14)
    plot_batches(batches, tmp_path / "x.png")
    [(text, figure)] = titles
    assert len(batches) > 8 and text == f"microbatches of one optimizer step, 8 of {len(batches)}"
    assert sum(bool(axis.get_title()) for axis in figure.axes) == 8 * 4


def test_max_tokens_per_microbatch_cuts_and_drops(tmp_path) -> None:
    seen = []

    class Count(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append(batch.num_positions)

    groups = make_groups(seed=1, longest=30)
    _, result = learn(
        tmp_path, groups=groups, max_tokens_per_microbatch=16, trainer={"callbacks": [Count()], "devices": 1}
    )
    lengths = [len(t.token_histories[0]) - 1 for group in groups for t in group]
    assert len(seen) > 2 and max(seen) <= 16
    assert result.dropped["overlong_trajectories"] == sum(length > 16 for length in lengths) > 0
    assert result.metrics["data/num_dropped_overlong"] == result.dropped["overlong_trajectories"]


def test_allow_training_without_logprobs(tmp_path) -> None:
    groups = make_groups(seed=1)
    for group in groups:
        for trajectory in group:
            trajectory.token_histories[0].logprobs.fill_(math.nan)
    with pytest.raises(FitRLError, match="group 0, trajectory 0: .* have no logprob"):
        learn(tmp_path / "a", groups=groups)
    _, result = learn(tmp_path / "b", groups=groups, allow_training_without_logprobs=True)
    assert result.metrics["ratio/mean"] == 1.0
    assert "mismatch/kl" not in result.metrics


def test_scale_learning_rate_by_reward_std_dev(tmp_path) -> None:
    model = fitrl.TrainableModel("run", "arguments", "tiny", lora=None, root=tmp_path)
    groups = make_groups(seed=1)
    with LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        first = trainer.fit_rl(model, groups, **COMMON, scale_learning_rate_by_reward_std_dev=True)
        for group in groups:
            for trajectory in group:
                trajectory.reward *= 0.5
        second = trainer.fit_rl(model, groups, **COMMON, scale_learning_rate_by_reward_std_dev=True)
    assert first.metrics["loss/learning_rate"] == pytest.approx(1e-3)
    assert second.metrics["loss/learning_rate"] == pytest.approx(0.5e-3)


def test_logprob_calculation_chunk_size_bounds_the_rows_of_logits(tmp_path, monkeypatch) -> None:
    rows = []
    logits = LinearHead.logits
    monkeypatch.setattr(
        LinearHead, "logits", lambda head, tile: rows.append(tile.stop - tile.start) or logits(head, tile)
    )
    learn(tmp_path / "a", precalculate_logprobs=True, logprob_calculation_chunk_size=5)
    scored, trained = rows[:-1], rows[-1]
    assert max(scored) == 5 and sum(scored) == trained > 5
    with pytest.raises(InvalidArgumentError, match="has no effect"):
        learn(tmp_path / "b", logprob_calculation_chunk_size=5)


class Reinforce:
    """A custom objective: REINFORCE on the logprobs, token mean."""

    def __init__(self, inputs="logprobs") -> None:
        self.inputs = inputs
        self.calls = 0

    def __call__(self, inputs: fitrl.LossInputs, /) -> fitrl.PolicyLoss:
        self.calls += 1
        if self.inputs == "logprobs":
            logprobs = inputs.logprobs
        else:
            if self.inputs == "hidden":
                logits = inputs.hidden @ inputs.weight.T / inputs.temperature[:, None]
            else:
                logits = inputs.logits
            logprobs = logits.log_softmax(-1).gather(1, inputs.targets[:, None]).squeeze(1)
        loss = -(torch.where(inputs.mask, logprobs, 0.0) * inputs.advantages).sum() / inputs.num_tokens
        return fitrl.PolicyLoss(loss=loss, metrics={"entropy_of_mine": loss.detach()})


def test_custom_objectives_over_logprobs_logits_and_hidden_states_agree(tmp_path) -> None:
    norms = {}
    for kind in ("logprobs", "logits", "hidden"):
        objective = Reinforce(kind)
        _, result = learn(tmp_path / kind, objective=objective)
        assert objective.calls == 1
        assert "objective/entropy_of_mine" in result.metrics
        norms[kind] = result.metrics["loss/grad_norm"]
    _, plain = learn(tmp_path / "plain")
    assert norms["logits"] == pytest.approx(norms["logprobs"], rel=1e-5)
    assert norms["hidden"] == pytest.approx(norms["logprobs"], rel=1e-5)
    assert norms["logprobs"] != pytest.approx(plain.metrics["loss/grad_norm"], rel=1e-5)


class Returns:
    """A custom objective over logprobs that returns what it is told to make of a fair loss."""

    inputs = "logprobs"

    def __init__(self, make) -> None:
        self.make = make

    def __call__(self, inputs: fitrl.LossInputs, /) -> fitrl.PolicyLoss:
        return self.make(-(inputs.logprobs * inputs.advantages).sum() / inputs.num_tokens)


def test_a_custom_objective_has_the_metrics_of_every_call(tmp_path) -> None:
    metrics = {"of_mine": 2.5, "of_mine_max": 3}
    objective = Returns(lambda loss: fitrl.PolicyLoss(loss=loss, metrics=metrics))
    _, result = learn(tmp_path, objective=objective, max_tokens_per_microbatch=32)
    assert result.metrics["objective/of_mine"] > 2.5 and result.metrics["objective/of_mine_max"] == 3.0
    assert {"loss/train", "mismatch/kl", "mismatch/prob_corr"} <= result.metrics.keys()


WRONG_LOSSES = {
    "a bare tensor": (lambda loss: loss, "must return a fitrl.PolicyLoss.*got Tensor"),
    "no gradient": (lambda loss: fitrl.PolicyLoss(loss=loss.detach()), "has no gradient"),
    "a float": (lambda loss: fitrl.PolicyLoss(loss=loss.item()), "must be a scalar tensor, got float"),
    "a vector": (lambda loss: fitrl.PolicyLoss(loss=loss[None]), r"must be a scalar tensor, got .* \(1,\)"),
    "a text": (lambda loss: fitrl.PolicyLoss(loss=loss, metrics={"m": "x"}), "metric 'm' of Returns must be a number"),
}


@pytest.mark.parametrize("case", WRONG_LOSSES)
def test_a_wrong_loss_names_the_objective(case, tmp_path) -> None:
    make, words = WRONG_LOSSES[case]
    with pytest.raises(InvalidArgumentError, match=f"Returns.*{words}|{words}"):
        learn(tmp_path, objective=Returns(make))


def test_a_metric_that_comes_later_is_an_error(tmp_path) -> None:
    seen = []

    def make(loss):
        seen.append(1)
        return fitrl.PolicyLoss(loss=loss, metrics={"late": 1.0} if len(seen) > 1 else {})

    with pytest.raises(InvalidArgumentError, match="the same metrics for every microbatch.*late"):
        learn(tmp_path, objective=Returns(make), max_tokens_per_microbatch=32)


def test_a_custom_objective_may_learn_from_flat_groups(tmp_path) -> None:
    class Entropy(Reinforce):
        teaches_without_advantage = True

    groups = make_groups(seed=1)
    for group in groups:
        for trajectory in group:
            trajectory.reward = 1.0
    _, dropped = learn(tmp_path / "a", groups=groups, objective=Reinforce())
    _, kept = learn(tmp_path / "b", groups=groups, objective=Entropy())
    assert (dropped.num_optimizer_steps, kept.num_optimizer_steps) == (0, 1)


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradient(tmp_path, monkeypatch) -> None:
    # one thread: the compiler would keep a pool of more for the life of the process
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    _, plain = learn(tmp_path / "a")
    _, compiled = learn(tmp_path / "b", trainer={"compile": True})
    assert compiled.metrics["loss/grad_norm"] == pytest.approx(plain.metrics["loss/grad_norm"], rel=1e-4)


def test_compile_compiles_each_decoder_layer(tmp_path, monkeypatch) -> None:
    called = []

    def pretend(function, **options):
        def compiled(layer, *args, **kwargs):
            called.append(type(layer).__name__)
            return function(layer, *args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", pretend)
    learn(tmp_path, trainer={"compile": True})
    assert called == ["Qwen3DecoderLayer"] * 4


def test_activation_checkpointing_computes_layers_twice_and_changes_nothing(tmp_path) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    counts = {}
    for on in (False, True):
        calls = []
        # before, not after: the second computation stops as soon as backward has what it needs
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args, calls=calls: calls.append(1) if isinstance(module, Qwen3MLP) else None
        )
        _, result = learn(tmp_path / str(on), trainer={"activation_checkpointing": on})
        hook.remove()
        counts[on] = (len(calls), result.metrics["loss/grad_norm"])
    assert counts[True][0] == counts[False][0] + 4  # four layers
    assert counts[True][1] == pytest.approx(counts[False][1], rel=1e-5)


def test_activation_checkpointing_holds_fewer_logits_at_once(tmp_path, monkeypatch) -> None:
    rows = []
    logits = LinearHead.logits
    monkeypatch.setattr(
        LinearHead, "logits", lambda head, tile: rows.append(tile.stop - tile.start) or logits(head, tile)
    )
    [batch] = pack(make_samples(seed=1, num_trajectories=500), layout="padded")
    found = {}
    for on in (False, True):
        model = fitrl.TrainableModel("rows", "tests", "tiny", lora=None, root=tmp_path / str(on))
        options = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}
        with LocalTrainer(activation_checkpointing=on, **options) as trainer:
            verbs = trainer.open(model)
            loss = verbs.forward_backward(batch).loss
            found[on] = [float(loss), verbs.optim_step().grad_norm]
    trained = len(batch.loss_inputs.targets)
    assert rows == [trained, 2048, trained - 2048]
    assert found[True] == pytest.approx(found[False], rel=1e-4)
    rows.clear()
    monkeypatch.setattr("fitrl.objective.linear_head._TILE_BYTES", {"cpu": 1000 * 262 * 4})  # as of a large vocabulary
    with LocalTrainer(activation_checkpointing=True, accelerator="cpu", devices=1, enable_model_summary=False) as small:
        small.open(fitrl.TrainableModel("few", "tests", "tiny", lora=None, root=tmp_path)).forward_backward(batch)
    assert max(rows) == 500  # a fixed number of rows would be more than without


def test_sampler_is_handed_the_new_weights(tmp_path) -> None:
    class Recorder:
        version = 0
        seen = None

        async def sample(self, prompt_ids, **kwargs):
            raise NotImplementedError

        def update(self, weights, version) -> None:
            self.seen, self.version = dict(weights), version

    sampler = Recorder()
    learn(tmp_path, trainer={"sampler": sampler})
    assert sampler.version == 1
    assert "model.embed_tokens.weight" in sampler.seen


def test_strategy_must_be_one_of_ours() -> None:
    with pytest.raises(InvalidArgumentError, match="needs a strategy of fitrl"):
        LocalTrainer(strategy="auto", accelerator="cpu", devices=1)
    with pytest.raises(InvalidArgumentError, match="trains on one device"):
        LocalTrainer(accelerator="cpu", devices=2)


def test_every_argument_has_a_test_here() -> None:
    elsewhere = {
        *("model", "groups", "reference", "save_checkpoint", "verbose", "plot_tensors", "max_tokens_per_microbatch"),
        *("allow_training_without_logprobs", "scale_learning_rate_by_reward_std_dev"),
        *("logprob_calculation_chunk_size", "objective"),
        *("strategy", "compile", "activation_checkpointing", "sampler", "lightning_options"),
    }
    accepted = set(inspect.signature(LocalTrainer.fit_rl).parameters) | set(
        inspect.signature(LocalTrainer.__init__).parameters
    )
    assert accepted - {"self"} == set(CHANGES_WEIGHTS) | elsewhere


def test_unknown_and_wrong_backend_keywords_name_the_backend(tmp_path) -> None:
    for wrong in ("deploy_checkpoint", "train_mlp", "learningrate"):
        with pytest.raises(UnknownArgumentError, match=f"LocalTrainer.*'{wrong}'.*'local' takes: learning_rate, ppo"):
            learn(tmp_path, **{wrong: True})
    assert issubclass(UnknownArgumentError, TypeError)


NO_EFFECT_OR_WRONG = {
    "dual_clip without ppo": {"dual_clip": 2.0},
    "ratio_cap without ppo": {"ratio_cap": 9.0},
    "kl_estimator without KL": {"kl_estimator": "k2"},
    "kl_in without KL": {"kl_in": "advantage"},
    "norm_length without norm": {"norm_length": 5.0},
    "norm without norm_length": {"loss_aggregation": "seq_mean_token_sum_norm"},
    "KL without reference": {"kl_coef": 0.1},
    "reference without KL": {"reference": "base"},
    "TIS without old logprobs": {"truncated_importance_sampling": 2.0},
    "custom beside others": {"objective": Reinforce(), "ppo": True},
    "no custom objective": {"objective": fitrl.Objective()},
    "k1 in the loss": {"kl_coef": 0.1, "reference": "base", "kl_estimator": "k1"},
    "k2 in the advantage": {"kl_coef": 0.1, "reference": "base", "kl_estimator": "k2", "kl_in": "advantage"},
    "KL in the advantage without logprobs": {
        "kl_coef": 0.1,
        "reference": "base",
        "kl_in": "advantage",
        "allow_training_without_logprobs": True,
    },
    "learning_rate": {"learning_rate": math.nan},
    "balance": {"advantage_balance": 1.5},
    "minibatches": {"num_minibatches": 0},
    "epochs": {"num_epochs": 0},
    "chunk": {"logprob_calculation_chunk_size": 0},
    "tokens": {"max_tokens_per_microbatch": 0},
    "power": {"num_trajectories_learning_rate_multiplier_power": math.inf},
    "level": {"importance_sampling_level": "word"},
    "a rate in quotes": {"learning_rate": "5e-6"},
    "half a minibatch": {"num_minibatches": 1.5},
    "a true minibatch": {"num_minibatches": True},
    "ppo in quotes": {"ppo": "x"},
    "verbose in quotes": {"verbose": "x"},
    "seed": {"seed": None},
    "a true reference": {"kl_coef": 0.1, "reference": True},
    "half a reference": {"kl_coef": 0.1, "reference": 1.5},
    "a window below zero": {"epsilon": 2.0},
}


@pytest.mark.parametrize("case", NO_EFFECT_OR_WRONG)
def test_contradictions_raise_before_anything_happens(case, tmp_path) -> None:
    with pytest.raises(InvalidArgumentError):
        learn(tmp_path, **NO_EFFECT_OR_WRONG[case])
    assert not list(tmp_path.iterdir())


def test_a_wrong_type_names_the_argument_and_the_value(tmp_path) -> None:
    with pytest.raises(InvalidArgumentError, match="num_minibatches must be a whole number, got 1.5"):
        learn(tmp_path, num_minibatches=1.5)
    with pytest.raises(InvalidArgumentError, match="verbose must be True or False, got 'x'"):
        learn(tmp_path, verbose="x")


def test_model_and_groups_are_checked(tmp_path) -> None:
    model = fitrl.TrainableModel("run", "arguments", "tiny", root=tmp_path)
    with LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        with pytest.raises(InvalidArgumentError, match="model must be a TrainableModel, got 'tiny'"):
            trainer.fit_rl("tiny", make_groups(seed=1))
        with pytest.raises(InvalidArgumentError, match="groups must be TrajectoryGroups, got None"):
            trainer.fit_rl(model, None)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_pack_pads_and_counts_padding_as_length(tmp_path, monkeypatch) -> None:
    from fitrl.policy import loading

    probe = loading.probe
    monkeypatch.setattr(loading, "probe", lambda policy: (probe(policy), setattr(policy, "can_pack", False)))
    groups = make_groups(seed=1)
    short, long = (groups[0].trajectories[i].token_histories for i in (0, 1))
    groups[0].trajectories[0].token_histories = [*short, *long]
    layouts = []

    class Keep(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            layouts.append(batch.layout)
            assert batch.num_positions <= limit

    lengths = [len(history) - 1 for history in groups[0].trajectories[0].token_histories]
    assert lengths[0] != lengths[1]
    limit = 2 * max(lengths) - 1  # enough for both in a row, too little for both as rows
    _, result = learn(
        tmp_path, groups=groups, max_tokens_per_microbatch=limit, trainer={"callbacks": [Keep()]}, save_checkpoint=False
    )
    assert set(layouts) == {"padded"} and result.dropped["overlong_trajectories"] >= 1
