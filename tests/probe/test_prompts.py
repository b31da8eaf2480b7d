# SPDX-License-Identifier: Apache-2.0
"""What is put around image and text: the token ids of each prompt, its text rows, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor

from mir_callback import MIRConfig, MIRMonitor, Probe, evaluate_mir
from mir_callback.config import MIRArguments
from mir_callback.errors import ConfigError
from mir_callback.probe.adapters import HuggingFaceAdapter, cut_text, find_adapter
from mir_callback.probe.prompt import as_format, check_prompt
from tests import tiny_models
from tests.samples import SENTENCE, pairs

FAMILIES = [tiny_models.llava, tiny_models.qwen2_5_vl, tiny_models.idefics3, tiny_models.paligemma]
AUTHORS = "A chat. USER: {image}\n ASSISTANT: {text}</s>"
# As the templates of these models are: every turn between marks, the image token where the image stands.
CHAT = (
    "{{% for turn in messages %}}<|{{{{ turn.role }}}}|>{{% for part in turn.content %}}"
    "{{% if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text | trim }}}}{{% endif %}}"
    "{{% endfor %}}{{{{ eos_token }}}}\n{{% endfor %}}"
)


def adding(processor, single):
    """The processor with a tokenizer that adds special tokens by itself, such as ``<s> $A``."""
    tokenizer = processor.tokenizer
    named = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>") if token in single]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=named)
    return processor


def encode(model, processor, prompt, probe, max_text_tokens=100):
    return HuggingFaceAdapter(model, processor, prompt=prompt).encode(probe.samples, max_text_tokens)


def placeholder_of(build):
    return "<|vision_start|><|image_pad|><|vision_end|>" if build is tiny_models.qwen2_5_vl else "<image>"


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(3))


@pytest.mark.parametrize("build", FAMILIES)
@pytest.mark.parametrize(
    "prompt", [AUTHORS, "{image}{text}", "{{{image}}} {text}\n", "<s>One. {image} {text}", "\n<s>{image} {text}"]
)
def test_ids_are_those_of_the_filled_prompt(build, prompt, probe):
    model, processor = build()
    processor = adding(processor, "<s> $A")
    batch = encode(model, processor, prompt, probe)
    text_ids = batch.text_ids or [None] * len(probe)
    assert (batch.text_ids is None) == (build is tiny_models.paligemma)
    for sample, ids, text, image in zip(
        probe.samples, batch.token_ids, text_ids, (sample.open_image() for sample in probe.samples), strict=True
    ):
        filled = prompt.format(image=placeholder_of(build), text=sample.text)
        own = {"add_special_tokens": False} if "<s>" in prompt else {}
        assert ids.tolist() == processor(images=[[image]], text=[filled], **own)["input_ids"][0]
        tail = prompt.partition("{image}")[2].format(text=sample.text).replace("}}", "}")
        expected = processor.tokenizer(tail, add_special_tokens=False)["input_ids"]
        if build is not tiny_models.paligemma:  # whose processor adds BOS after the image, and a newline
            assert text.tolist()[-len(expected) :] == expected
        assert ids.tolist().count(processor.tokenizer.bos_token_id) <= 1 + (build is tiny_models.paligemma)


@pytest.mark.parametrize("build", FAMILIES)
@pytest.mark.parametrize("bos", ["", "{{{{ bos_token }}}}"])
@pytest.mark.parametrize("single", ["$A", "<s> $A"])
def test_chat_is_what_the_processors_apply_chat_template_gives(build, bos, single, probe):
    model, processor = build()
    processor = adding(processor, single)
    processor.chat_template = (bos + CHAT).format(image=placeholder_of(build))
    adapter = HuggingFaceAdapter(model, processor, prompt="chat")
    for sample, ids in zip(probe.samples, adapter.encode(probe.samples, 100).token_ids, strict=True):
        turns = [
            {"role": "user", "content": [{"type": "image", "image": sample.open_image()}]},
            {"role": "assistant", "content": [{"type": "text", "text": sample.text}]},
        ]
        expected = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
        assert ids.tolist() == expected["input_ids"][0].tolist()
    start = "<s>" if bos else ""
    assert adapter.prompt == f"{start}<|user|>{{image}}</s>\n<|assistant|>{{text}}</s>\n"
    written = encode(model, processor, adapter.prompt, probe).token_ids
    assert all(torch.equal(*both) for both in zip(written, adapter.encode(probe.samples, 100).token_ids, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_rows_are_the_story_and_what_the_prompt_has_after_the_image(batch_size):
    model, processor = tiny_models.llava()
    long = Probe.from_pairs([(image, SENTENCE * 3) for image, _ in pairs(3)], max_text_tokens=9)
    plain = evaluate_mir(model, long, processor=processor, batch_size=batch_size)
    report = evaluate_mir(model, long, processor=processor, batch_size=batch_size, prompt=AUTHORS)
    assert plain.num_text_tokens == 3 * 9
    assert report.num_vision_tokens == plain.num_vision_tokens
    # The story is cut, the </s> after it is not; nothing before the image is text.
    story = cut_text(processor.tokenizer, SENTENCE * 3, 9)
    after = processor.tokenizer(f"\n ASSISTANT: {story}</s>", add_special_tokens=False)["input_ids"]
    assert report.num_text_tokens == 3 * len(after) > 3 * (9 + 1)
    batch = encode(model, processor, AUTHORS, long, 9)
    assert [ids.tolist() for ids in batch.text_ids] == [after] * 3


def test_a_value_says_its_prompt_and_another_prompt_is_another_definition(probe):
    model, processor = tiny_models.llava()
    processor.chat_template = CHAT.format(image="<image>")
    plain, same, written, chat = (
        evaluate_mir(model, probe, processor=processor, **({"prompt": prompt} if prompt else {}))
        for prompt in (None, "plain", "{image}{text}", "chat")
    )
    assert plain.mir == same.mir == written.mir != chat.mir
    assert plain.prompt == same.prompt == written.prompt == "{image}{text}"
    assert plain.tokens_fingerprint == written.tokens_fingerprint != chat.tokens_fingerprint
    assert chat.to_fields()["prompt"] == chat.prompt == "<|user|>{image}</s>\n<|assistant|>{text}</s>\n"
    assert plain.probe_fingerprint == chat.probe_fingerprint


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("", "no prompt"),
        (3, "no prompt"),
        ("USER: {text}", "no {image}"),
        ("{image} USER:", "no {text}"),
        ("{image}{text}{image}", "more than one {image}"),
        ("{text}{image}", "{text} before {image}"),
        ("{image}{story}", "unknown place {story}"),
        ("{}{image}{text}", "unknown place {}"),
        ("{image.__class__}{text}", "unknown place {image.__class__}"),
        ("{image[0]}{text}", r"unknown place {image[0]}"),
        ("{image!r}{text}", "formats a place"),
        ("{image}{text:>9}", "formats a place"),
        ("{image}{text", "no format string"),
        ("{image}{text}}", "no format string"),
    ],
)
def test_a_prompt_without_its_places_is_refused_with_its_value(prompt, why):
    for refuse, name in ((check_prompt, "prompt"), (MIRConfig, "prompt"), (MIRArguments, "mir_prompt")):
        with pytest.raises(ConfigError) as caught:
            refuse(**{name: prompt})
        assert f"prompt={prompt!r}" in str(caught.value)
        assert why in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=8).filter(lambda text: "<image>" not in text), min_size=3, max_size=3))
def test_a_format_string_of_a_filled_prompt_fills_to_it(parts):
    before, between, after = parts
    filled = f"{before}<image>{between}PROBETEXT{after}"
    found = as_format(filled, "<image>", "PROBETEXT")
    check_prompt(found)
    assert found.format(image="<image>", text="PROBETEXT") == filled
    assert as_format(f"{before}PROBETEXT{between}<image>{after}", "<image>", "PROBETEXT") is None
    assert as_format(f"<image>{filled}", "<image>", "PROBETEXT") is None


def test_a_family_without_a_chat_template_is_refused_by_name():
    for build in FAMILIES:
        model, processor = build()
        with pytest.raises(ConfigError, match=f"{type(processor).__name__} has no chat_template.*USER: "):
            find_adapter(model, processor, prompt="chat")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for turn in messages %}{{ turn.content }}{% endfor %}", "does not put one <image> and then the text"),
        ("{{ messages[1].content[0].text }}<image>", "does not put one <image> and then the text"),
        ("<image><image>{{ messages[1].content[0].text }}", "does not put one <image> and then the text"),
        ("{{ raise_exception('roles must alternate') }}", "failed .*roles must alternate"),
        ("{{ messages[0].content + 'x' }}", "failed "),
    ],
)
def test_a_chat_template_that_does_not_place_image_and_text_is_refused(template, why):
    model, processor = tiny_models.llava()
    processor.chat_template = template
    with pytest.raises(ConfigError, match=f"prompt='chat'.*LlavaProcessor.*{why}"):
        find_adapter(model, processor, prompt="chat")


@pytest.mark.parametrize(
    "text", ["{{ text | upper }}", "{{ text[:20] }}", "{{ text }} {{ text }}", "{{ text }}{{ range(10**5) | random }}"]
)
def test_a_chat_template_that_changes_texts_is_refused(text, probe):
    model, processor = tiny_models.llava()
    processor.chat_template = f"<image>{{% set text = messages[1].content[0].text %}}{text}"
    with pytest.raises(ConfigError, match="prompt='chat'.*LlavaProcessor.*text of pair 0"):
        encode(model, processor, "chat", probe)


def test_a_prompt_that_brings_the_image_token_itself_is_refused():
    for build, token in ((tiny_models.llava, "<image>"), (tiny_models.qwen2_5_vl, "<|vision_start|>")):
        with pytest.raises(ConfigError, match="contains") as caught:
            find_adapter(*build(), prompt=f"{token}{{image}}{{text}}")
        assert repr(token) in str(caught.value)


def test_special_tokens_that_prompt_and_tokenizer_both_add_are_refused(probe):
    model, processor = tiny_models.llava()
    processor = adding(processor, "<s> $A </s>")
    assert encode(model, processor, "{image}{text}", probe).token_ids[0][-1] == processor.tokenizer.eos_token_id
    with pytest.raises(ConfigError, match="'</s>' twice"):
        encode(model, processor, "{image}{text}</s>", probe)


def test_a_processor_that_puts_the_image_elsewhere_is_refused(probe):
    class ImageFirst(LlavaProcessor):
        """As BLIP-2's and Fuyu's: the image always comes first."""

        def __call__(self, images=None, text=None, **options):
            return super().__call__(images, ["<image>" + each.replace("<image>", "") for each in text], **options)

    model, processor = tiny_models.llava()
    processor.__class__ = ImageFirst
    encode(model, processor, "{image} {text}", probe)
    with pytest.raises(ConfigError, match=r"ImageFirst puts the image at token 0, .*prompt='USER: "):
        encode(model, processor, "USER: {image} {text}", probe)


def test_a_name_is_refused_before_any_forward_wherever_it_is_given(tmp_path, probe):
    model, processor = tiny_models.llava()
    for watch in (
        lambda **given: evaluate_mir(model, probe, **given),
        lambda **given: MIRMonitor(model, probe, output_dir=tmp_path, **given),
    ):
        with pytest.raises(ConfigError, match="prompt='v1': LlavaForConditionalGeneration has no conversations"):
            watch(processor=processor, prompt="v1")
        with pytest.raises(ConfigError, match="prompt='plain' beside adapter=HuggingFaceAdapter"):
            watch(adapter=HuggingFaceAdapter(model, processor), prompt="plain")
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_ones_own_may_say_its_prompt_or_not(tmp_path, probe):
    class Wrapped:
        """An adapter with the two methods of the protocol and nothing else."""

        def __init__(self, adapter):
            self.encode, self.live_masks = adapter.encode, adapter.live_masks

    model, processor = tiny_models.llava()
    adapter = Wrapped(HuggingFaceAdapter(model, processor))
    monitor = MIRMonitor(model, probe, adapter=adapter, output_dir=tmp_path)
    assert monitor.history[0].prompt is None
    assert "prompt" not in monitor.history[0].to_dict()
