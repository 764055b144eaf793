"""Token ids as the original LLaVA code makes them, straight from sentencepiece: the oracle for every tokenizer of the family.

Two algorithms one inside the other, written out without transformers:
- LLaVA's `tokenizer_image_token` (llava/mm_utils.py): the prompt is cut at `<image>`, each piece is tokenised on its own, BOS stays
  once at the front, and -200 stands for the image;
- transformers 4.37's slow LlamaTokenizer with legacy=False, which tokenised each piece.
"""

from functools import cache
from pathlib import Path

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

IMAGE_TOKEN_INDEX = -200
BOS, EOS = 1, 2
UNDERLINE = "▁"


def original_token_ids(sentencepiece_model_path: Path, prompt: str) -> list[int]:
    """Ids of `prompt`, BOS first, -200 at each `<image>`; `</s>` in the text is the EOS token."""
    sentencepiece = _without_dummy_prefix(sentencepiece_model_path)
    ids = [BOS]
    for number, piece in enumerate(prompt.split("<image>")):
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
        ids += _slow_llama_ids(sentencepiece, piece)
    return ids


@cache
def _without_dummy_prefix(path: Path) -> SentencePieceProcessor:
    """The slow tokenizer turned sentencepiece's own leading space off and wrote it into the text itself."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(path).read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def _slow_llama_ids(sentencepiece: SentencePieceProcessor, text: str) -> list[int]:
    if not text:
        return []
    ids: list[int] = []
    for number, part in enumerate((UNDERLINE + text.replace(UNDERLINE, " ")).split("</s>")):
        if number:
            if ids == [sentencepiece.piece_to_id(UNDERLINE)]:  # a text that starts with a special token loses the prefix again
                ids = []
            ids.append(EOS)
        if part.startswith((UNDERLINE, " ")):
            # The slow tokenizer hides the leading space behind an "<unk>", where sentencepiece never strips it.
            unknown = sentencepiece.encode("<unk>")
            ids += sentencepiece.encode("<unk>" + part)[len(unknown) :]
        elif part:
            ids += sentencepiece.encode(part)
    return ids
