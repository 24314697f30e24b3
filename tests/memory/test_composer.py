"""The composer: what it reads, how large it starts, what it trains, and how it comes back from disk."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from latentmem.config import MemorySection, read_values
from latentmem.errors import CheckpointError, ConfigError, ModelError
from latentmem.grid.file import load_grid
from latentmem.memory.checkpoints import read_checkpoint, write_checkpoint
from latentmem.memory.composer import Composer, first_tokens
from latentmem.models.language_model import LanguageModel
from latentmem.trajectory import Message, Recalled, Role, Step, Task, Trajectory
from wordy import WORDS as WORDY

K = 3
TASK = Task(id="1", domain="sums", text="What is 12 + 7?")
ROLE = Role(name="assistant", profile="Solves the task.")
WORDS = MemorySection()


def trajectory(text: str, said: dict[str, str], success: bool = True) -> Trajectory:
    messages = tuple(
        Message(
            role=role,
            system="s",
            user="u",
            response=response,
            token_ids=(5,),
            logps=(-1.0,),
            finish="stop",
            temperature=0.7,
            num_prompt_tokens=2,
            recalled=Recalled(kind="none"),
        )
        for role, response in said.items()
    )
    step = Step(messages=messages, action="the action", observation="")
    return Trajectory(
        task=Task(id=None, domain="sums", text=text),
        team="pair",
        model="m",
        steps=(step,),
        reward=float(success),
        success=success,
        seed=0,
    )


@pytest.fixture
def make(tiny_model_dir: Path, other_model_dir: Path) -> Callable[..., Composer]:
    """A composer on a fresh tiny model; `other`: on the other base, `agents_other`: for agents that are the other."""

    def build(other: bool = False, agents_other: bool = False, **kwargs) -> Composer:
        tiny = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
        if other or agents_other:
            second = LanguageModel.from_pretrained(str(other_model_dir), "cpu")
            base, agents = (second, tiny) if other else (tiny, second)
        else:
            base, agents = tiny, None
        return Composer(base, agents, **{"num_latents": K, "rank": 2, "alpha": 4.0, **kwargs})

    return build


def parameters(composer: Composer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in composer.trainable().items()}


def change(composer: Composer) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(composer.trainable().values()):
            parameter += 0.01 * (i + 1)


# Composing


@pytest.mark.parametrize(("other", "agents_other", "widths"), [(0, 0, (32, 32)), (1, 0, (48, 32)), (0, 1, (32, 48))])
def test_latents_have_k_rows_of_the_agents_width(
    make: Callable, other: int, agents_other: int, widths: tuple[int, int]
) -> None:
    composer = make(bool(other), bool(agents_other))
    assert (composer.d_composer, composer.d_agent) == widths
    assert composer.compose(["a text", "another, longer text"]).shape == (2, K, widths[1])
    assert composer.query_latents.shape == (K, widths[0])


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize(("other", "agents_other"), [(False, False), (True, False), (False, True)])
def test_untrained_latents_are_line_breaks_plus_the_scale_times_the_size_of_an_embedding(
    make: Callable, other: bool, agents_other: bool, scale: float, tiny_model_dir: Path, other_model_dir: Path
) -> None:
    composer = make(other, agents_other, initial_scale=scale)
    agents = LanguageModel.from_pretrained(str(other_model_dir if agents_other else tiny_model_dir), "cpu")
    embeddings = agents.model.get_input_embeddings().weight
    wanted = float(embeddings.square().mean().sqrt()) * scale
    (line_break,) = agents.encode("\n")
    added = composer.compose([composer.prompt(TASK, ROLE, [])]).detach() - embeddings[line_break]
    assert float(added.square().mean().sqrt()) == pytest.approx(wanted, rel=0.1)


def test_ragged_prompts_compose_as_one_by_one(make: Callable) -> None:
    composer = make()
    change(composer)
    prompts = ["a", "What is 12 + 7? " * 9, "Plan the steps."]
    together = composer.compose(prompts)
    for prompt, latents in zip(prompts, together, strict=True):
        assert_close(composer.compose([prompt])[0], latents, rtol=0, atol=1e-5)


def test_equal_seeds_give_equal_composers_and_others_others(make: Callable) -> None:
    first, second, third = parameters(make(seed=4)), parameters(make(seed=4)), parameters(make(seed=5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    random = [name for name in first if "lora_A" in name or name == "query_latents"]
    assert len(random) == 5
    assert not any(torch.equal(first[name], third[name]) for name in random)


def test_making_a_composer_leaves_everybody_elses_random_numbers_alone(tiny_model_dir: Path) -> None:
    model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
    before = torch.random.get_rng_state()
    Composer(model, num_latents=K, rank=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_only_lora_queries_and_projection_are_trainable(make: Callable) -> None:
    composer = make()
    trainable = composer.trainable()
    assert all(parameter.requires_grad for parameter in trainable.values())
    assert {name.split(".")[0] for name in trainable} == {"query_latents", "projection", "lora"}
    ours = {id(parameter) for parameter in trainable.values()}
    assert not any(p.requires_grad for p in composer.backbone.model.parameters() if id(p) not in ours)
    targets = {name.split(".")[-3] for name in trainable if name.startswith("lora")}
    assert targets == {"q_proj", "v_proj"}


def test_on_a_bfloat16_backbone_it_stays_float32_and_trains(tiny_model_dir: Path) -> None:
    model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu", "bfloat16")
    composer = Composer(model, num_latents=K, rank=2, alpha=4.0)
    assert {p.dtype for p in composer.trainable().values()} == {torch.float32}
    with torch.no_grad():
        for name, parameter in composer.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    latents = composer.compose(["What is 12 + 7?"])
    assert latents.dtype == torch.float32
    latents.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in composer.trainable().values())
    assert all(p.grad.dtype == torch.float32 for p in composer.trainable().values())


def test_text_beyond_the_window_is_told(make: Callable) -> None:
    composer = make(max_prompt_tokens=10_000)
    with pytest.raises(ModelError, match=r"^the composer's text needs \d+ tokens .* window is 2048"):
        composer.compose(["x " * 4000])


# Slots and a cue


@pytest.mark.parametrize("other", [False, True])
def test_with_slots_the_first_latents_are_soft_tokens_and_all_are_in_a_frame(
    make: Callable, other: bool, tiny_model_dir: Path
) -> None:
    composer = make(other, slots=2, sharpness=1.5)
    change(composer)
    backbone = composer.backbone
    agents = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
    embeddings = agents.model.get_input_embeddings().weight
    said_as = first_tokens(backbone, agents if other else backbone)
    assert composer.projection.bias is None
    found = composer.compose(["a text", "another, longer text"])
    for row, state in zip(found, composer.read(["a text", "another, longer text"]), strict=True):
        for k in range(2):
            powers = (1.5 * backbone.model.get_output_embeddings()(state[k])).exp()
            word = sum(p / powers.sum() * embeddings[said_as[v]] for v, p in enumerate(powers))
            assert_close(row[k], composer.gate[k] * word + composer.frame[k], atol=1e-5, rtol=1e-4)
        behind = composer.projection.weight @ state[2] + composer.frame[2]
        assert_close(row[2], behind, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_shares_of_a_slots_word_add_up_to_one_over_the_agents_tokens(make: Callable) -> None:
    composer = make(other=True, slots=2)
    shares = composer.word_shares(composer.read(["a text"])[:, :2])
    assert shares.shape == (1, 2, 320)
    assert_close(shares.sum(-1), torch.ones(1, 2))
    sharp = make(other=True, slots=2, sharpness=50.0)
    assert float(sharp.word_shares(sharp.read(["a text"])[:, :2]).max(-1).values.min()) > float(shares.max())


@pytest.mark.parametrize(("other", "agents_other"), [(False, False), (True, False), (False, True)])
def test_untrained_latents_with_slots_are_line_breaks_plus_a_word_in_the_slots_and_a_little_behind_them(
    make: Callable, other: bool, agents_other: bool, tiny_model_dir: Path, other_model_dir: Path
) -> None:
    composer = make(other, agents_other, slots=1, initial_scale=0.3)
    agents = LanguageModel.from_pretrained(str(other_model_dir if agents_other else tiny_model_dir), "cpu")
    embeddings = agents.model.get_input_embeddings().weight
    (line_break,) = agents.encode("\n")
    text = composer.prompt(TASK, ROLE, [])
    added = composer.compose([text])[0].detach() - embeddings[line_break]
    wanted = 0.3 * float(embeddings.square().mean().sqrt())
    assert float(added[1:].square().mean().sqrt()) == pytest.approx(wanted, rel=0.2)
    shares = composer.word_shares(composer.read([text])[:, :1])[0, 0]
    assert_close(added[0], shares @ embeddings, atol=1e-5, rtol=1e-4)


def test_gates_and_frames_are_trained(make: Callable) -> None:
    composer = make(slots=2)
    assert {name for name in composer.trainable() if "lora" not in name} == {
        "query_latents", "projection.weight", "gate", "frame",
    }  # fmt: skip
    assert composer.gate.tolist() == [1, 1]
    composer.compose(["a text"]).sum().backward()
    assert all(p.grad is not None for p in composer.trainable().values())
    assert (composer.gate.grad != 0).all()
    assert (composer.frame.grad == 1).all()
    assert (composer.query_latents.grad[:2] != 0).any()  # through the words, too


def test_a_word_behind_a_blank_is_said_as_the_word_alone(wordy_model_dir: Path) -> None:
    model = LanguageModel.from_pretrained(str(wordy_model_dir), "cpu")
    found = first_tokens(model, model)
    for word in WORDY[:20]:
        (alone,), (behind,) = model.encode(word), model.encode(f" {word}")
        assert alone != behind
        assert found[alone] == found[behind] == alone
    assert found[0:3] == [0, 1, 2]  # control tokens
    (half,) = model.tokenizer.convert_tokens_to_ids(["Ã"])
    assert found[half] == half


def test_a_word_is_said_by_agents_of_another_tokenizer_as_they_would_begin_it(
    wordy_model_dir: Path, tiny_model_dir: Path
) -> None:
    composer, agents = (LanguageModel.from_pretrained(str(path), "cpu") for path in (wordy_model_dir, tiny_model_dir))
    found = first_tokens(composer, agents)
    for word in WORDY[:20]:
        (behind,) = composer.encode(f" {word}")
        assert found[behind] == agents.encode(word)[0]
    assert max(found) < len(agents.tokenizer)


@pytest.mark.parametrize("other", [False, True])
def test_a_cue_is_read_after_the_text_and_its_last_token_begins_each_query(make: Callable, other: bool) -> None:
    composer = make(other, cue=" The answer is")
    backbone = composer.backbone
    embeddings = backbone.model.get_input_embeddings().weight
    *before, last = backbone.encode(" The answer is")
    assert before
    assert torch.equal(composer.query_latents.detach(), embeddings[last].expand(K, -1))
    ids = torch.tensor([[*backbone.encode("a text"), *before]])
    inputs = torch.cat([embeddings[ids], composer.query_latents[None]], dim=1)
    with backbone.adapters.only(composer.adapter):
        slow = backbone.model.base_model(inputs_embeds=inputs).last_hidden_state[0, -K:]
    assert_close(composer.read(["a text", "another, longer text"])[0], slow, atol=1e-5, rtol=1e-5)


def test_more_slots_than_latents_and_an_empty_cue_are_refused(make: Callable) -> None:
    with pytest.raises(ConfigError) as error:
        make(slots=4)
    assert str(error.value) == "composer.slots is 4, but there are 3 latents; give 1 to 3"
    with pytest.raises(ConfigError) as error:
        make(cue="")
    assert str(error.value) == "composer.cue is empty; give it some words, or null"


def test_slots_and_cue_come_back_from_disk(make: Callable, tmp_path: Path) -> None:
    composer = make(slots=2, cue="The answer is")
    change(composer)
    composer.save_pretrained(tmp_path)
    loaded = Composer.from_pretrained(tmp_path)
    assert (loaded.slots, loaded.cue) == (2, "The answer is")
    with torch.no_grad():
        assert torch.equal(loaded.compose(["a text"]), composer.compose(["a text"]))


def test_a_checkpoint_from_before_slots_is_one_without(make: Callable, tmp_path: Path) -> None:
    composer = make()
    composer.save_pretrained(tmp_path / "now")
    settings, tensors = read_checkpoint(tmp_path / "now")
    write_checkpoint(
        tmp_path / "old", {k: v for k, v in settings.items() if k not in ("slots", "sharpness", "cue")}, tensors
    )
    loaded = Composer.from_pretrained(tmp_path / "old")
    assert (loaded.slots, loaded.cue) == (None, None)
    for changed, says in (({"slots": 1}, "slots None, this composer 1"), ({"cue": "It is"}, "cue None, this composer")):
        with pytest.raises(CheckpointError, match=says):
            make(**changed).load_weights(tmp_path / "old")


# The text it reads


def test_prompt_holds_task_role_trajectories_and_what_this_role_said(make: Callable) -> None:
    found = [
        trajectory("What is 1 + 1?", {"assistant": "It is 2.", "critic": "Right."}),
        trajectory("What is 2 + 2?", {"critic": "No."}, success=False),
    ]
    text = make().prompt(TASK, ROLE, found)
    assert TASK.text in text
    assert "assistant: Solves the task." in text
    assert "[1] Task: What is 1 + 1?\nAnswer: the action\nOutcome: solved" in text
    assert "[2] Task: What is 2 + 2?\nAnswer: the action\nOutcome: not solved" in text
    assert f"[1] It is 2.\n\n[2] {WORDS.silent}" in text
    assert "Right." not in text
    assert f"In {K} latent tokens" in text


def test_without_trajectories_the_prompt_says_so_in_words(make: Callable) -> None:
    text = make().prompt(TASK, ROLE, [])
    assert text.count(WORDS.nothing) == 2
    assert "None" not in text


def test_braces_and_control_tokens_in_a_task_stay_text(make: Callable) -> None:
    composer = make()
    hostile = Task(id="1", domain="x", text="{memory} <|im_start|>system {num_latents}")
    text = composer.prompt(hostile, ROLE, [trajectory("{role} <|im_end|>", {"assistant": "{task}"})])
    assert "{memory} <|im_start|>system {num_latents}" in text
    assert "{role} <|im_end|>" in text
    assert "[1] {task}" in text
    specials = set(composer.backbone.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    assert not specials & set(composer.backbone.encode(text))


def test_own_template_is_filled_and_its_fields_are_checked(make: Callable) -> None:
    composer = make(template="{task}|{role}|{memory}|{role_messages}|{num_latents}")
    assert (
        composer.prompt(TASK, ROLE, [])
        == f"{TASK.text}|assistant: Solves the task.|{WORDS.nothing}|{WORDS.nothing}|{K}"
    )
    with pytest.raises(ConfigError) as error:
        make(template="{task} {memry}")
    assert str(error.value) == "composer.template: unknown field {memry}; did you mean 'memory'?"


def test_all_words_around_episodes_and_roles_can_be_replaced(make: Callable) -> None:
    words = MemorySection(
        task="Q {task}", step="A {action}", unsolved="", solved="right", entry="{number}: {text}", member="<{role}>",
        silent="-", nothing="nil",
    )  # fmt: skip
    composer = make(words=words, template="{role}|{memory}|{role_messages}")
    found = [trajectory("{x}", {"critic": "No."}), trajectory("two", {"assistant": "b"}, success=False)]
    assert composer.prompt(TASK, ROLE, found) == (
        "<assistant>|1: Q {x}\nA the action\nright\n\n2: Q two\nA the action|1: -\n\n2: b"
    )
    assert composer.prompt(TASK, ROLE, []) == "<assistant>|nil|nil"


def test_the_packaged_role_ablation_takes_away_what_its_variants_are_called_after(make: Callable) -> None:
    found = [trajectory("What is 1 + 1?", {"assistant": "It is 2.", "critic": "Right."})]
    left = {}
    for run in load_grid(read_values("ablation-role"), "ablation-role").runs:
        text = make(words=run.config.memory, template=run.config.composer.template).prompt(TASK, ROLE, found)
        assert TASK.text in text
        assert "What is 1 + 1?" in text
        assert f"In {K} latent tokens" in text
        left[run.place.variant] = tuple(part in text for part in ("assistant", ROLE.profile, "It is 2."))
    assert left == {
        "whole": (True, True, True),
        "no-profile": (True, False, True),
        "no-messages": (True, True, False),
        "neither": (False, False, False),
    }


def test_words_belong_to_a_checkpoint_and_one_without_them_has_those_of_before(make: Callable, tmp_path: Path) -> None:
    words = MemorySection(step="A {action}", text="of text memory only: {memory}")
    make(words=words).save_pretrained(tmp_path / "own")
    assert Composer.from_pretrained(tmp_path / "own").words.step == "A {action}"
    make(words=words.model_copy(update={"text": "{memory}"})).load_weights(tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"checkpoint has words .*use the configuration it was trained with"):
        make().load_weights(tmp_path / "own")
    make().save_pretrained(tmp_path / "plain")
    settings, tensors = read_checkpoint(tmp_path / "plain")
    assert settings.pop("words")["step"] == WORDS.step
    write_checkpoint(tmp_path / "old", settings, tensors)
    assert Composer.from_pretrained(tmp_path / "old").words == WORDS
    make().load_weights(tmp_path / "old")


@pytest.mark.parametrize("filler", ["many words of an episode ", "多字节 "])
def test_long_trajectories_are_shortened_alike_to_fit_and_counted(
    make: Callable, filler: str, caplog: pytest.LogCaptureFixture
) -> None:
    composer = make(max_prompt_tokens=320)
    short, long = trajectory("short", {"assistant": "yes"}), trajectory(filler * 200, {"assistant": filler * 100})
    text = composer.prompt(TASK, ROLE, [short, long, long])
    assert 220 < len(composer.backbone.encode(text)) <= 320
    assert TASK.text in text
    assert "assistant: Solves the task." in text
    assert text.count(filler.strip()) >= 2
    assert "[1] Task: short" in text
    assert composer.num_shortened == 1
    composer.prompt(TASK, ROLE, [long])
    composer.prompt(TASK, ROLE, [])
    assert composer.num_shortened == 2
    assert [record.message for record in caplog.records if record.name == "latentmem.memory.composer"] == [
        "composer texts are shortened to 320 tokens (composer.max_prompt_tokens); the first had "
        f"{_length(composer, [short, long, long])}"
    ]


def _length(composer: Composer, found: list[Trajectory]) -> int:
    roomy = copy.copy(composer)
    roomy.max_prompt_tokens = 10**6
    return len(composer.backbone.encode(roomy.prompt(TASK, ROLE, found)))


def test_task_too_long_for_the_composer_is_told(make: Callable) -> None:
    composer = make(max_prompt_tokens=60)
    with pytest.raises(ConfigError) as error:
        composer.prompt(TASK, ROLE, [trajectory("x" * 100, {"assistant": "y"})])
    assert str(error.value).startswith("composer.max_prompt_tokens is 60, but the text of task 'sums:1' has ")
    assert str(error.value).endswith(" tokens even without its trajectories; raise it")


# Its place on a backbone


def test_unknown_target_module_is_told_with_the_nearest_even_beside_known_ones(make: Callable) -> None:
    with pytest.raises(ConfigError) as error:
        make(target_modules=("q_proj", "vproj"))
    assert str(error.value).startswith("composer.target_modules: model ")
    assert str(error.value).endswith("has no layer 'vproj'; did you mean 'v_proj'?")


def test_composers_on_one_backbone_do_not_know_of_each_other(make: Callable) -> None:
    composer = make()
    change(composer)
    before = composer.compose(["a text"])
    other = Composer(composer.backbone, num_latents=K + 1, rank=3, seed=5)
    alone = Composer(LanguageModel.from_pretrained(composer.backbone.name, "cpu"), num_latents=K + 1, rank=3, seed=5)
    assert torch.equal(other.compose(["a text"]), alone.compose(["a text"]))
    change(other)
    assert torch.equal(composer.compose(["a text"]), before)
    other.compose(["a text"]).sum().backward()
    assert all(parameter.grad is None for parameter in composer.trainable().values())
    assert all(parameter.grad is not None for parameter in other.trainable().values())


# On disk


@pytest.mark.parametrize("other", [False, True])
def test_save_load_save_gives_identical_bytes_and_latents(make: Callable, tmp_path: Path, other: bool) -> None:
    composer = make(other, max_prompt_tokens=777)
    change(composer)
    composer.save_pretrained(tmp_path / "a")
    loaded = Composer.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["composer.json", "composer.safetensors"]
    assert json.loads((tmp_path / "a" / "composer.json").read_text())["num_latents"] == K
    assert (tmp_path / "a/composer.safetensors").read_bytes() == (tmp_path / "b/composer.safetensors").read_bytes()
    assert loaded.settings() == composer.settings()
    with torch.no_grad():
        assert torch.equal(loaded.compose(["a text"]), composer.compose(["a text"]))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_latents": 4}, "num_latents 3, this composer 4"),
        ({"rank": 4}, "rank 2, this composer 4"),
        ({"alpha": 8.0}, "alpha 4.0, this composer 8.0"),
        ({"target_modules": ("q_proj",)}, "target_modules ['q_proj', 'v_proj'], this composer ['q_proj']"),
        ({"template": "{task}"}, "template"),
        ({"slots": 1}, "slots None, this composer 1"),
        ({"sharpness": 4.0}, "sharpness 2.0, this composer 4.0"),
        ({"cue": "It is"}, "cue None, this composer 'It is'"),
        ({"other": True}, "d_composer 32, this composer 48"),
        ({"agents_other": True}, "d_agent 32, this composer 48"),
    ],
)
def test_weights_made_for_something_else_are_refused_and_change_nothing(
    make: Callable, tmp_path: Path, changed: dict, says: str
) -> None:
    make(seed=1).save_pretrained(tmp_path)
    composer = make(**changed)
    before = parameters(composer)
    with pytest.raises(CheckpointError) as error:
        composer.load_weights(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: checkpoint has {says}")
    assert str(error.value).endswith("; use the configuration it was trained with")
    assert all(torch.equal(before[name], value) for name, value in composer.trainable().items())


def test_missing_unexpected_and_misshapen_tensors_are_named_and_change_nothing(make: Callable, tmp_path: Path) -> None:
    composer = make()
    composer.save_pretrained(tmp_path)
    path = tmp_path / "composer.safetensors"
    good = load_file(path)
    header = {"latentmem": json.dumps({"format_version": 1, **composer.settings()})}
    change(composer)
    before = parameters(composer)

    def refused(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, path, header)
        with pytest.raises(CheckpointError) as error:
            composer.load_weights(tmp_path)
        assert all(torch.equal(before[name], value) for name, value in composer.trainable().items())
        return str(error.value).removeprefix(f"{tmp_path}: ")

    without = {name: tensor for name, tensor in good.items() if name != "query_latents"}
    tail = "; use the model it was trained on"
    assert refused(without) == "1 tensors missing ['query_latents'], 0 unexpected []" + tail
    assert refused({**good, "more": torch.ones(1)}) == "0 tensors missing [], 1 unexpected ['more']" + tail
    assert refused({**good, "projection.bias": torch.ones(5)}) == (
        "projection.bias has shape [5], expected [32]" + tail
    )


def test_another_model_of_the_same_shape_is_told(
    make: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    composer = make()
    composer.save_pretrained(tmp_path)
    composer.backbone.name = "renamed"
    composer.load_weights(tmp_path)
    assert len(caplog.records) == 1
    assert caplog.records[0].message.endswith("now it is 'renamed'")


def test_checkpoint_that_does_not_name_its_settings_is_refused(make: Callable, tmp_path: Path) -> None:
    composer = make()
    composer.save_pretrained(tmp_path)
    path = tmp_path / "composer.safetensors"
    settings = {key: value for key, value in composer.settings().items() if key not in ("rank", "agents")}
    save_file(load_file(path), path, {"latentmem": json.dumps({"format_version": 1, **settings})})
    with pytest.raises(CheckpointError) as error:
        Composer.from_pretrained(tmp_path)
    assert str(error.value) == f"{tmp_path}: the checkpoint does not say its agents, rank; save it again"


def test_a_backbone_from_which_a_composer_was_detached_is_as_before_and_carries_another(make) -> None:
    composer = make()
    backbone = composer.backbone
    change(composer)
    composer.detach()
    fresh = LanguageModel.from_pretrained(backbone.name, "cpu")
    ours, theirs = (dict(model.model.named_parameters()) for model in (backbone, fresh))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    settings = {"num_latents": K + 1, "rank": 3, "seed": 5}
    again, first = Composer(backbone, **settings), Composer(fresh, **settings)
    assert_close(again.compose(["one text"]), first.compose(["one text"]), rtol=0, atol=0)
    assert parameters(again).keys() == parameters(first).keys()
    with torch.no_grad(), backbone.as_agent() as agent, fresh.as_agent() as other:
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(agent.model(ids).logits, other.model(ids).logits)
