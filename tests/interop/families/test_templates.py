"""Token ids around video, question and answer, family by family."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors

from tests.interop.families.configs import (
    LLAVA_ONEVISION,
    LLAVA_VIDEO,
    ONEVISION_JINJA,
    VIDEO_LLAVA,
)
from tests.interop.families.published_folder import sized
from tpo_jax.data.text import train_tokenizer
from tpo_jax.interop.chat_template import ChatTemplateError
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.registry import named
from tpo_jax.interop.families.source import fitted_codec, open_codec, read_config
from tpo_jax.interop.huggingface import HuggingFaceError

# Pieces that the first tokenizer of Mistral, which is Llama's, has for these texts.
PIECES = [
    ["▁", "▁[", "INST", "]", "▁<", "▁</", "Video", "Image", ">", "[", "/"],
    ["▁US", "ER", ":", "▁ASS", "IST", "ANT", "▁What", "What", "?", "▁It", "<0x0A>"],
]


def test_a_missing_tokenizer_is_named_with_the_lines_that_write_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAVA_VIDEO))
    with pytest.raises(HuggingFaceError, match=r"tokenizer.json: missing; [^$]*AutoTokenizer.from"):
        open_codec(tmp_path)


def llama_tokenizer():
    """Byte-pair encoding of those pieces with Llama's spaces: one in front of every text."""
    alphabet = sorted(set("".join(piece for piece in sum(PIECES, []) if piece != "<0x0A>")))
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "<0x0A>", *alphabet])}
    merges = []
    for piece in sum(PIECES, []):
        for end in range(2, len(piece) + 1) if piece != "<0x0A>" else ():
            left, right = piece[: end - 1], piece[end - 1]
            if piece[:end] not in vocabulary:
                vocabulary[piece[:end]] = len(vocabulary)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer


def tokens(codec, media="video"):
    """(before, after, question and answer) as texts of tokens."""
    prefix = codec.build_prefix(1, media).tolist()
    branch = codec.build_branch("What?", "It").ids.tolist()
    names = codec.tokenizer.id_to_token
    offset = codec.template.visual_offset
    return tuple(
        [names(i) for i in ids] for ids in (prefix[:offset], prefix[offset + 1 :], branch)
    )


def test_videochat_has_bos_in_front_of_every_segment():
    """Lengths 7 and 8 with <s> are those of the release's own tokenizer."""
    codec = fitted_codec(llama_tokenizer(), named("videochat").template)
    before, after, branch = tokens(codec)
    assert before == ["<s>", "▁[", "INST", "]", "▁<", "Video", ">"] and len(before) == 7
    assert after == ["<s>", "▁</", "Video", ">", "[", "/", "INST", "]"] and len(after) == 8
    assert branch == ["<s>", "▁", "▁[", "INST", "]", "▁What", "?",
                      "▁[", "/", "INST", "]", "▁", "▁It", "</s>"]  # fmt: skip
    image = tokens(codec, "image")
    assert (image[0][5], image[1][2], len(image[0]), len(image[1])) == ("Image", "Image", 7, 8)


@pytest.mark.parametrize("name", ["video_llava", "video_llava_original"])
def test_video_llava_is_one_text_around_the_frames(name):
    """As the tokenizer has "\\nWhat? ASSISTANT:" in one piece: no space before the question. In
    front of it the original has the system sentence of its `conv_vicuna_v1`."""
    codec = fitted_codec(llama_tokenizer(), named(name).template)
    for media in ("video", "image"):
        before, after, branch = tokens(codec, media)
        assert (before[0], before[-4:]) == ("<s>", ["▁US", "ER", ":", "▁"])
        assert (len(before) == 5) == (name == "video_llava")
        assert after == ["▁", "<0x0A>"]
        assert branch == ["What", "?", "▁ASS", "IST", "ANT", ":", "▁It", "</s>"]
    system = "assistant. The assistant gives helpful, detailed, and polite answers to the user's "
    text = named(name).template.before_video
    assert (f"{system}questions. USER: " in text) == (name == "video_llava_original")
    assert text.startswith("<s>A chat between a curious user and") or text == "<s>USER: "


VIDEO_LLAVA_JINJA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% else %}{{ '<' + c['type'] + '>\\n' }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def chatml_tokenizer():
    tokenizer = train_tokenizer(["user assistant system\nYou are a helpful assistant."] * 9, 400)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return tokenizer


def chatml_folder(path, data, **files):
    (path / "tokenizer.json").write_text(chatml_tokenizer().to_str())
    (path / "config.json").write_text(json.dumps(sized(data)))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("files", [
    {"chat_template": {"chat_template": ONEVISION_JINJA}},
    {"processor_config": {"chat_template": ONEVISION_JINJA},
     "tokenizer_config": {"chat_template": "{{ 'of the language model' }}"}},
])  # fmt: skip
def test_onevision_has_no_system_turn(tmp_path, files):
    chatml_folder(tmp_path, LLAVA_ONEVISION, **files)
    codec = open_codec(tmp_path)
    before, after, branch = tokens(codec)
    assert before == ["<|im_start|>", "user", "Ġ"] and after == ["Ċ"]
    said = "".join(branch).replace("Ċ", "\n")
    assert said == "What?<|im_end|><|im_start|>assistant\nIt<|im_end|>"
    assert tokens(codec, "image")[:2] == (before, after)


def test_a_onevision_folder_without_a_chat_template_is_refused_with_the_option(tmp_path):
    """Its converter writes one, so a file was lost; that of Video-LLaVA writes none."""
    files = {"processor_config": {"num_image_tokens": 9},
             "tokenizer_config": {"chat_template": "{{ 'of the language model' }}"}}  # fmt: skip
    chatml_folder(tmp_path, LLAVA_ONEVISION, **files)
    with pytest.raises(FamilyError, match="no chat template .*--chat_template=FILE.jinja"):
        open_codec(tmp_path)
    assert tokens(open_codec(tmp_path, jinja=ONEVISION_JINJA))[0] == ["<|im_start|>", "user", "Ġ"]
    llama_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(sized(VIDEO_LLAVA)))
    assert open_codec(tmp_path).template.before_video == "<s>USER: "


def test_a_checkpoints_own_template_is_followed(tmp_path):
    other = ONEVISION_JINJA.replace("{{ m['role'] + ' ' }}", "{{ m['role'] + '\\n' }}")
    chatml_folder(tmp_path, LLAVA_ONEVISION, processor_config={"chat_template": other})
    assert tokens(open_codec(tmp_path))[0] == ["<|im_start|>", "user", "Ċ"]
    assert tokens(open_codec(tmp_path, jinja=ONEVISION_JINJA))[0][-1] == "Ġ"
    for text in ("{{ messages[0]['content'] + '' }}", "no video"):
        with pytest.raises(ChatTemplateError, match="chat_template=FILE.jinja"):
            open_codec(tmp_path, jinja=text)


def test_bos_of_the_tokenizer_and_end_of_an_answer_complete_a_template(tmp_path):
    """Video-LLaVA's says neither: its tokenizer adds <s>, its trainer </s>."""
    llama_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(sized(VIDEO_LLAVA)))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": VIDEO_LLAVA_JINJA}))
    codec = open_codec(tmp_path)
    assert codec.template == named("video_llava").template.__class__(
        before_video="<s>USER: ", after_video="\n", before_image="<s>USER: ", after_image="\n",
        user="", assistant=" ASSISTANT:", end="</s>", pad="<unk>", visual_offset=5,
        sampling="evenly", frames=8,
    )  # fmt: skip


def test_a_llava_qwen_folder_that_names_no_template_is_refused_with_the_option(tmp_path):
    """LLaVA-NeXT's code has many, and Vicuna's where nobody asks for another."""
    data = {k: v for k, v in LLAVA_VIDEO.items() if k != "conv_template"}
    chatml_folder(tmp_path, data)
    with pytest.raises(FamilyError, match="does not say conv_template.*--set conv_template=VALUE"):
        open_codec(tmp_path)
    told = open_codec(tmp_path, {"conv_template": "qwen_1_5"})
    with pytest.raises(FamilyError, match="conv_template='vicuna_v1': this program has one of"):
        open_codec(tmp_path, {"conv_template": "vicuna_v1"})
    read_config(tmp_path, {"conv_template": "qwen_1_5"})  # as an export takes it
    assert tokens(open_codec(tmp_path, jinja=ONEVISION_JINJA))[0] == ["<|im_start|>", "user", "Ġ"]
    chatml_folder(tmp_path, LLAVA_VIDEO)
    assert open_codec(tmp_path).template == told.template


def test_llava_video_has_the_system_turn_of_qwen(tmp_path):
    chatml_folder(tmp_path, LLAVA_VIDEO)
    codec = open_codec(tmp_path)
    before, after, branch = tokens(codec)
    said = "".join(branch).replace("Ċ", "\n")
    assert said == "What?<|im_end|>\n<|im_start|>assistant\nIt<|im_end|>"
    assert before[0] == "<|im_start|>" and before[-3:] == ["<|im_start|>", "user", "Ċ"]
    text = codec.tokenizer.decode(
        codec.build_prefix(1).tolist()[: len(before)], skip_special_tokens=False
    )
    assert text == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                    "<|im_start|>user\n")  # fmt: skip
    assert after == ["Ċ"]
