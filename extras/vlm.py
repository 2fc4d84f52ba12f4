"""The reward `ask`: a vision-language model that takes videos, and keeps the gradient of their pixels."""

import torch
import transformers

import rewards
from rewards import as_bad_input, exact, require

FLAG = "ask (--vlm)"


class VisionLanguageModel:
    """A frozen model of a folder or the hub. Raises BadInput for one that can't be asked about videos.

    network: what answers; yes, no: the numbers of the tokens that say so alone.
    """

    def __init__(self, source, device, dtype, quantize="none"):
        self.source = source
        self.processor = rewards.load(transformers.AutoProcessor, source, FLAG)
        require(hasattr(self.processor, "video_processor"), f"{FLAG}: {source} takes no videos")
        kind = transformers.AutoModelForImageTextToText
        self.network = rewards.load(kind, source, FLAG, dtype=dtype, device=device)
        if quantize != "none":
            from extras.base_lora import quantize as quantize_linear_layers

            quantize_linear_layers(self.network, quantize, dtype)
        text_config = self.network.config.get_text_config()
        self.longest = getattr(text_config, "max_position_embeddings", 1e9)
        resize = self.processor.video_processor.resize

        def resize_and_cut(*args, **kwargs):
            # as on the 8 bits a channel that processors expect: what overshoots when it is resized is cut
            return resize(*args, **kwargs).clamp(0, 255)

        self.processor.video_processor.resize = resize_and_cut
        self.yes = self.tokens_of("yes")
        self.no = self.tokens_of("no")
        distinct = self.yes and self.no and not set(self.yes) & set(self.no)
        require(distinct, f"{FLAG}: the tokenizer of {source} has no token for yes or no: give another --vlm")
        self.check_gradient()

    def tokens_of(self, word):
        """The tokens that say this word alone, in any case, with and without a space before it."""
        numbers = set()
        for spelling in (word, word.title(), word.upper()):
            for text in (spelling, " " + spelling):
                tokens = self.processor.tokenizer(text, add_special_tokens=False).input_ids
                if len(tokens) == 1:
                    numbers.add(tokens[0])
        return sorted(numbers)

    def prepare(self, clip, question):
        """clip: (8, 3, H, W) -> what the network takes: the processor's own, of float pixels."""
        content = [{"type": "video"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        chat = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        clip = 255 * exact(clip) + 1e-3  # SmolVLM drops a frame that is exactly 0 after its processor
        kwargs = {"do_sample_frames": False, "return_tensors": "pt"}
        with as_bad_input(f"{FLAG}: {self.source} can't take {question[:60]!r} and a video"):
            inputs = self.processor(text=[chat], videos=[[clip]], **kwargs)
        fits = inputs.input_ids.shape[1] <= self.longest
        require(fits, f"ask: question and prompt have over {self.longest} tokens")
        return inputs.to(self.network.device)

    def answers(self, clips, questions):
        """clips: (B, 8, 3, H, W), a question each -> logits of the answers' first tokens, (B, vocabulary)."""
        logits = []
        for clip, question in zip(clips, questions, strict=True):
            inputs = self.prepare(clip, question)
            logits.append(self.network(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1])
        return torch.stack(logits)

    def check_gradient(self):
        """Raises BadInput unless processor and network fit together, and pixels keep their gradient."""
        noise = torch.rand(8, 3, 64, 64, requires_grad=torch.is_grad_enabled())
        inputs = self.prepare(noise, "Is it?")
        kept = not noise.requires_grad
        for value in inputs.values():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                kept = True
        advice = "give another --vlm, as SmolVLM2"
        require(kept, f"{FLAG}: the processor of {self.source} loses the gradient: {advice}")
        problem = f"{FLAG}: network and processor of {self.source} do not fit together"
        with torch.no_grad(), as_bad_input(problem):
            self.network(**inputs, use_cache=False, logits_to_keep=1)

    def check(self, questions):
        """Raises BadInput for a question that can't be asked: too long, or with a special token in it."""
        longest = max(questions, key=len)
        for question in set(questions):
            if "<" in question or question == longest:
                self.prepare(torch.rand(8, 3, 64, 64), question)
