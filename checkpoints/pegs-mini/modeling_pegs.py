"""PEGS: a language model that perceives stickers and answers with text and a sticker (StickerConv, section 4)."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import create_repo, snapshot_download, upload_folder
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, Blip2QFormerModel, Blip2VisionModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.import_utils import torch_compilable_check

from .backbones import find_language_model, find_vision_model, load_vision
from .configuration_pegs import PegsConfig
from .feature_mapper import FeatureMapper
from .generation_pegs import PegsGenerationMixin, add_sticker_odds, list_stop_ids
from .retrieval_head import RetrievalHead, info_nce_loss


ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
POSITIONS_AT_ONCE = 256
# Arguments of `from_pretrained` that a referenced language model is loaded with as well.
SHARED_ARGUMENTS = ("device_map", "max_memory", "offload_folder")
DOWNLOAD_ARGUMENTS = ("token", "cache_dir", "local_files_only")
PUSH_ARGUMENTS = ("repo_id", "commit_message", "private", "create_pr")


@dataclass
class PegsOutput(ModelOutput):
    """
    Output of [`PegsModel`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Weighted sum of the losses (eq. 10), returned with `labels`.
        logits (`torch.Tensor` of shape `(B, T, V + 3 + r)`, *optional*): Scores of the old and the added vocabulary.
        past_key_values (`Cache`, *optional*): The language model's cache.
        last_hidden_state (`torch.Tensor` of shape `(B, T, d)`): The language model's last hidden states.
        lm_loss (`torch.Tensor` of shape `()`, *optional*): Eq. 4.
        retrieval_loss (`torch.Tensor` of shape `()`, *optional*): Eq. 8.
        generation_loss (`torch.Tensor` of shape `()`, *optional*): Eq. 9, mean over elements.
        text_embeds (`torch.Tensor` of shape `(S, e)`, *optional*): Replies in the retrieval space, if there are stickers to choose from.
        image_embeds (`torch.Tensor` of shape `(M, e)`, *optional*): Those stickers in the retrieval space.

    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    last_hidden_state: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
    retrieval_loss: torch.Tensor | None = None
    generation_loss: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None


class AddedVocabulary(nn.Module):
    """
    Embedding and output rows of the added tokens (eq. 1), kept apart so that the language model's own rows never change.

    Args:
        num_tokens (`int`): Number of added tokens.
        hidden_size (`int`): Hidden size d.
        first_id (`int`): Id of the first added token.

    """

    def __init__(self, num_tokens: int, hidden_size: int, first_id: int) -> None:
        super().__init__()
        self.first_id = first_id
        self.embedding = nn.Embedding(num_tokens, hidden_size)
        self.head = nn.Linear(hidden_size, num_tokens, bias=False)

    def embed(self, input_ids: torch.Tensor, base_embedding: nn.Module) -> torch.Tensor:
        """Embeddings `(B, T, d)` of ids `(B, T)` of the extended vocabulary."""
        is_added = input_ids >= self.first_id
        old = base_embedding(input_ids.masked_fill(is_added, 0))
        new = self.embedding((input_ids - self.first_id).clamp(min=0))
        return torch.where(is_added.unsqueeze(-1), new.to(old), old)

    def extend(self, hidden_states: torch.Tensor, base_logits: torch.Tensor) -> torch.Tensor:
        """Scores of the extended vocabulary: those of the base up to `first_id`, then the added ones."""
        added_logits = self.head(hidden_states.to(self.head.weight)).to(base_logits)
        return torch.cat([base_logits[..., : self.first_id], added_logits], dim=-1)


class PegsPreTrainedModel(PreTrainedModel):
    """Initialisation, and what the auto classes need to know."""

    config_class = PegsConfig
    base_model_prefix = "pegs"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Blip2EncoderLayer", "Blip2QFormerLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FeatureMapper):
            nn.init.normal_(module.queries)
        elif isinstance(module, PegsModel):
            nn.init.normal_(module.query_tokens, std=0.02)


class PegsModel(PegsPreTrainedModel, PegsGenerationMixin, GenerationMixin):
    """
    PEGS as retrieval, generation or retrieval-augmented generation (StickerConv, figure 3).

    Shapes use `B` dialogues, `T` tokens, `N` perceived stickers, `S` stickers to produce, `Q` query tokens, `k` retrieval and `r - k`
    generation tokens, hidden size `d`, retrieval size `e`, prompt embeddings `(L, D)`.

    Args:
        config ([`PegsConfig`]):
            Configuration. With `config.language_model` set, the language model is no part of the checkpoint: `from_pretrained`
            finds it and lays the checkpoint's LoRA adapter over it.

    """

    def __init__(self, config: PegsConfig) -> None:
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        if config.vision_config.model_type == "blip_2_vision_model":  # no auto class knows it
            self.vision_model = Blip2VisionModel(config.vision_config)
        else:
            self.vision_model = AutoModel.from_config(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel(config.qformer_config)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, hidden_size)
        self.added_vocabulary = AddedVocabulary(len(config.new_tokens), hidden_size, config.first_new_token_id)
        self.retrieval_head = self.feature_mapper = None
        if config.num_retrieval_tokens:
            self.retrieval_head = RetrievalHead(hidden_size, config.vision_config.hidden_size, config.retrieval_dim)
        if config.num_generation_tokens:
            self.feature_mapper = FeatureMapper(
                hidden_size,
                config.mapper_hidden_size,
                config.mapper_num_layers,
                config.mapper_num_heads,
                config.mapper_intermediate_size,
                config.prompt_length,
                config.prompt_dim,
            )
        self.timing_head = nn.Linear(hidden_size, 1) if config.timing_head else None
        self.language_model = None
        if config.language_model is None:
            self.attach_language_model(AutoModelForCausalLM.from_config(config.text_config))
        self.post_init()

    def attach_language_model(self, language_model: PreTrainedModel, adapter: str | os.PathLike | None = None) -> None:
        """
        Make `language_model` the frozen backbone, with LoRA over it if `config.lora` says so.

        Args:
            language_model (`PreTrainedModel`): A causal language model with the configuration `config.text_config`.
            adapter (`str` or `os.PathLike`, *optional*): Folder of a trained adapter; without it LoRA starts at zero.

        """
        language_model.requires_grad_(False)
        if self.config.language_model is not None:
            # in which folder of this machine it was found is nothing to publish
            name = self.config.language_model["hub_id"]
            language_model.name_or_path = language_model.config._name_or_path = name
            self.config.text_config._name_or_path = name
        if adapter is not None:
            language_model = _load_adapter(language_model, Path(adapter))
        elif self.config.lora is not None:
            language_model = get_peft_model(language_model, LoraConfig(task_type="CAUSAL_LM", **self.config.lora))
        self.language_model = language_model
        if self.generation_config is None or self.generation_config.eos_token_id is None:
            self.generation_config = copy.deepcopy(language_model.generation_config)
        # else settings of PEGS' own, such as `sticker_rate`, are dropped on load
        self.generation_config._from_model_config = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args,
        language_model_path: str | None = None,
        vision_model_path: str | None = None,
        quantization_config: object = None,
        attn_implementation: str | None = None,
        **kwargs,
    ) -> "PegsModel":
        """
        Load a checkpoint, and the language and vision models that it refers to. Only safetensors files are opened.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub id.
            language_model_path (`str`, *optional*): Folder of the language model; see [`find_language_model`] for the other ways.
            vision_model_path (`str`, *optional*): Folder of the vision checkpoint; see [`find_vision_model`] for the other way.
            quantization_config (`QuantizationConfigMixin`, *optional*): For the referenced language model, e.g. a `BitsAndBytesConfig`; all
                else keeps its precision.
            attn_implementation (`str`, *optional*): Of the language model, e.g. `"flash_attention_2"`.
            *args: As for `PreTrainedModel.from_pretrained`.
            **kwargs: As for `PreTrainedModel.from_pretrained`; `device_map`, and where and how files are looked for (`token`, `cache_dir`, `local_files_only`), hold for
                referenced models too.

        Returns:
            `PegsModel`: In evaluation mode.

        Raises:
            FileNotFoundError: If the referenced language or vision model is nowhere.
            ValueError: If there are no safetensors files, a tensor or the LoRA adapter is missing, or a tensor has another shape than the configuration
                says; or if there is no referenced language model to quantise.

        """
        _refuse_pickles(Path(pretrained_model_name_or_path, kwargs.get("subfolder", "")), "*.safetensors")
        info = kwargs.pop("output_loading_info", False)
        download = {name: kwargs[name] for name in DOWNLOAD_ARGUMENTS if name in kwargs}
        fixed = {
            "output_loading_info": True,
            "use_safetensors": True,
            "ignore_mismatched_sizes": True,  # they are refused below, in one line
        }
        if attn_implementation is not None:
            fixed["attn_implementation"] = {"text_config": attn_implementation}
        model, loading = super().from_pretrained(pretrained_model_name_or_path, *args, **{**kwargs, **fixed})
        for name, found, expected in sorted(loading["mismatched_keys"]):
            raise ValueError(_mismatch(pretrained_model_name_or_path, name, found, expected))
        referenced = model.referenced_parts()
        for name in sorted(name for name in loading["missing_keys"] if name.partition(".")[0] not in referenced):
            raise ValueError(f"{pretrained_model_name_or_path}: the tensor {name} is missing.")
        if referenced:
            load_vision(
                model, find_vision_model(model.config.vision_source, vision_model_path, **download), referenced
            )
        if model.config.language_model is not None:
            folder = find_language_model(model.config.language_model, language_model_path, **download)
            _refuse_pickles(folder, "*.safetensors")
            shared = {name: kwargs[name] for name in SHARED_ARGUMENTS if name in kwargs}
            if attn_implementation is not None:
                shared["attn_implementation"] = attn_implementation
            if quantization_config is not None:
                shared["quantization_config"] = quantization_config
            language_model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=model.dtype, use_safetensors=True, **shared
            )
            adapter = None
            if model.config.lora is not None:
                adapter = _checkpoint_folder(pretrained_model_name_or_path, kwargs) / ADAPTER_FOLDER
                if not adapter.is_dir():
                    raise ValueError(f"{adapter} is missing: the configuration says that there is LoRA.")
            model.attach_language_model(language_model, adapter)
        elif quantization_config is not None:
            raise ValueError(
                "`quantization_config` is for a referenced language model; this checkpoint holds its own. Quantise before merging."
            )
        model.eval()
        return (model, loading) if info else model

    def referenced_parts(self) -> list[str]:
        """Parts of perception that are no part of the checkpoint; see `config.vision_source`."""
        return (self.config.vision_source or {}).get("parts", [])

    def add_timing_head(self) -> None:
        """Give the model a timing head that changes nothing yet, if it has none."""
        if self.timing_head is None:
            self.config.timing_head = True
            self.timing_head = nn.Linear(self.config.text_config.hidden_size, 1).to(self.query_tokens)
            nn.init.zeros_(self.timing_head.weight)
            nn.init.zeros_(self.timing_head.bias)

    def merge(self) -> "PegsModel":
        """
        Fold LoRA into the language model and make that part of the checkpoint; generation is faster, too.

        Returns:
            `PegsModel`: This model, with `config.lora` and `config.language_model` `None`.

        """
        if isinstance(self.language_model, PeftModel):
            self.language_model = self.language_model.merge_and_unload()
        self.config.lora = self.config.language_model = None
        return self

    def save_pretrained(self, save_directory: str | os.PathLike, state_dict: dict | None = None, **kwargs) -> None:
        """
        Save the checkpoint; referenced language and vision models are left out, the LoRA adapter goes into `adapter/` in PEFT's format. What is pushed is the folder.

        Args:
            save_directory (`str` or `os.PathLike`): Folder.
            state_dict (`dict`, *optional*): Weights to save instead of the model's own.
            **kwargs: As for `PreTrainedModel.save_pretrained`.

        """
        given = type(self)  # where FSDP shards, a class of torch's laid over the model's
        kind = next(kind for kind in given.__mro__ if not kind.__module__.startswith("torch."))
        # `custom_object_save` adds the other auto classes, and knows of one only for a model
        self.config.auto_map = {"AutoModelForImageTextToText": f"{kind.__module__.split('.')[-1]}.PegsModel"}
        pushes = kwargs.pop("push_to_hub", False)  # the base class would upload in the middle, without the adapter
        push = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        left_out = self.referenced_parts()
        if self.config.language_model is not None:
            left_out = [*left_out, "language_model"]
        state_dict = self.state_dict() if state_dict is None else state_dict
        if isinstance(self.language_model, PeftModel) and "language_model" in left_out:
            prefix = "language_model."
            language_state = {
                key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)
            }
            for adapter in self.language_model.peft_config.values():
                adapter.base_model_name_or_path = self.config.language_model["hub_id"]
            self.language_model.save_pretrained(
                Path(save_directory) / ADAPTER_FOLDER,
                state_dict=language_state,
                save_embedding_layers=False,
                is_main_process=kwargs.get("is_main_process", True),
            )
        own = {key: value for key, value in state_dict.items() if key.partition(".")[0] not in left_out}
        language_model = self.language_model
        if "language_model" in left_out:
            self.language_model = None
        self.__class__ = kind  # whose code goes into the folder
        try:
            super().save_pretrained(save_directory, state_dict=own, **kwargs)
        finally:
            self.__class__, self.language_model = given, language_model
        if pushes and kwargs.get("is_main_process", True):
            repo, token = push.pop("repo_id", Path(save_directory).name), kwargs.get("token")
            repo = create_repo(repo, exist_ok=True, private=push.pop("private", None), token=token).repo_id
            upload_folder(repo_id=repo, folder_path=save_directory, token=token, **push)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """As in transformers; the names are always looked up anew, because those it notes itself do not know of a LoRA wrapper."""
        super().tie_weights(missing_keys, recompute_mapping=True)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's own embedding; the added tokens have theirs in `added_vocabulary`."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """`None`: nothing here is tied or resized."""
        return None

    def encode_images(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """
        Run the vision encoder alone; for a frozen one this is what can be kept.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, height, width)`): Stickers, normalised by the processor.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(N, P, p)` and `pooler_output` `(N, p)`.

        """
        pixel_values = pixel_values.to(self.query_tokens.dtype)
        if self.config.vision_config.model_type != "siglip2_vision_model":
            return self.vision_model(pixel_values)
        size = self.config.vision_config.patch_size  # SigLIP 2 takes patches of pictures of any shape
        count, _, height, width = pixel_values.shape
        patches = pixel_values.unfold(2, size, size).unfold(3, size, size)  # (N, 3, rows, columns, size, size)
        patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(count, -1, size * size * 3)
        return self.vision_model(
            patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
            spatial_shapes=torch.tensor([[height // size, width // size]] * count, device=patches.device),
        )

    def get_image_features(self, vision_states: torch.Tensor) -> torch.Tensor:
        """
        Turn what the vision encoder sees into vectors for the language model (section 4.1).

        Args:
            vision_states (`torch.Tensor` of shape `(N, P, p)`): The `last_hidden_state` of [`encode_images`].

        Returns:
            `torch.Tensor` of shape `(N, Q, d)`.

        """
        queries = self.query_tokens.expand(len(vision_states), -1, -1)
        states = self.qformer(query_embeds=queries, encoder_hidden_states=vision_states.to(queries.dtype))
        return self.language_projection(states.last_hidden_state)

    def embed_stickers(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Unit vectors `(N, e)` of stickers `(N, 3, height, width)` in the retrieval space (eq. 5)."""
        return self.retrieval_head.embed_image(self.encode_images(pixel_values).pooler_output)

    def check_placeholders(self, input_ids: torch.Tensor, images: torch.Tensor | None) -> None:
        """
        Check that ids `(B, T)` have `Q` placeholders for each of `images` `(N, ...)`.

        Raises:
            ValueError: If not.

        """
        expected = 0 if images is None else len(images) * self.config.num_query_tokens
        found = (input_ids == self.config.image_token_id).sum()
        torch_compilable_check(
            found == expected,
            lambda: (
                f"The sequence has {int(found)} <IMG> placeholders, {0 if images is None else len(images)} stickers need {expected}."
            ),
        )

    def get_inputs_embeds(self, input_ids: torch.Tensor, vision_states: torch.Tensor | None) -> torch.Tensor:
        """
        Embed a sequence with its perceived stickers in place.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): Ids of the extended vocabulary, `Q` times `<IMG>` a sticker.
            vision_states (`torch.Tensor` of shape `(N, P, p)`, *optional*): The stickers' vision states, in order of appearance.

        Returns:
            `torch.Tensor` of shape `(B, T, d)`.

        Raises:
            ValueError: If placeholders and stickers do not match in number.

        """
        embeds = self.added_vocabulary.embed(input_ids, self.get_input_embeddings())
        if vision_states is None and input_ids.shape[1] == 1:
            return embeds  # a step of generation, which never writes a placeholder and should not wait for a check
        self.check_placeholders(input_ids, vision_states)
        if vision_states is not None:
            features = self.get_image_features(vision_states).to(embeds.device, embeds.dtype)
            placeholders = (input_ids == self.config.image_token_id).unsqueeze(-1)
            embeds = embeds.masked_scatter(placeholders, features)
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_states: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        retrieval_features: torch.Tensor | None = None,
        retrieval_positives: torch.Tensor | None = None,
        sent_images: torch.Tensor | None = None,
        target_prompt_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_stickers_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> PegsOutput:
        """
        Run the language model over text and stickers, with the losses if `labels` are given.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): Ids of the extended vocabulary.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 where a token counts.
            pixel_values (`torch.Tensor` of shape `(N, 3, height, width)`, *optional*): Perceived stickers, in order.
            vision_states (`torch.Tensor` of shape `(N, P, p)`, *optional*): Instead of `pixel_values`, what [`encode_images`] made of them.
            inputs_embeds (`torch.Tensor` of shape `(B, T, d)`, *optional*): Embeddings instead of ids and stickers.
            position_ids (`torch.Tensor` of shape `(B, T)`, *optional*): Positions.
            past_key_values (`Cache`, *optional*): The language model's cache.
            use_cache (`bool`, *optional*): Whether to return a cache.
            labels (`torch.Tensor` of shape `(B, T)`, *optional*): Ids to predict, -100 where there is nothing to predict.
            retrieval_features (`torch.Tensor` of shape `(M, p)`, *optional*): Pooled vision outputs of the stickers to choose from.
            retrieval_positives (`torch.Tensor` of shape `(S, M)`, *optional*): Which of them is right for each produced sticker; without it
                there is no InfoNCE, but its two sides are returned.
            sent_images (`torch.Tensor` of shape `(S,)`, *optional*): Instead of `retrieval_features`, which of `pixel_values` the produced stickers are.
            target_prompt_embeds (`torch.Tensor` of shape `(S, L, D)`, *optional*): Text encoder output of the stickers' captions.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Labels of the whole effective batch, by which eq. 4 is averaged.
            num_stickers_in_batch (`torch.Tensor` or `int`, *optional*): Produced stickers of the whole effective batch, of which eq. 8 and 9 then get
                the share that are in this batch.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Number of last positions to score, 0 for all.
            **kwargs: Ignored; generation passes flags that only some language models know.

        Returns:
            [`PegsOutput`].

        """
        if inputs_embeds is None:
            if pixel_values is not None:
                vision = self.encode_images(pixel_values)
                vision_states = vision.last_hidden_state
                if sent_images is not None:
                    retrieval_features = vision.pooler_output[sent_images]
            inputs_embeds = self.get_inputs_embeds(input_ids, vision_states)
        outputs = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        hidden_states = outputs.last_hidden_state.to(inputs_embeds.device)  # of layers that may be spread over several
        texts = images = None
        if retrieval_features is not None:
            spans = self.get_img_hidden_states(input_ids, hidden_states)
            texts = self.retrieval_head.embed_text(spans[:, : self.config.num_retrieval_tokens])
            images = self.retrieval_head.embed_image(retrieval_features)
        if labels is None:
            kept = (
                hidden_states[:, -logits_to_keep:].contiguous()  # or the head is copied for each row
                if isinstance(logits_to_keep, int)
                else hidden_states[:, logits_to_keep]
            )
            return PegsOutput(
                logits=self.score(kept),
                past_key_values=outputs.past_key_values,
                last_hidden_state=hidden_states,
                text_embeds=texts,
                image_embeds=images,
            )
        predicts = labels[:, 1:] != -100
        lm_loss = self.language_loss(hidden_states[:, :-1][predicts], labels[:, 1:][predicts])
        lm_loss = lm_loss / (predicts.sum() if num_items_in_batch is None else num_items_in_batch)
        loss = self.config.lm_loss_weight * lm_loss
        retrieval_loss = generation_loss = None
        spans = self.get_img_hidden_states(input_ids, hidden_states)
        share = 1.0 if num_stickers_in_batch is None else len(spans) / num_stickers_in_batch
        if texts is not None and retrieval_positives is not None:
            retrieval_loss = info_nce_loss(texts, images, retrieval_positives, self.config.retrieval_temperature)
            retrieval_loss = retrieval_loss * share
            loss = loss + self.config.retrieval_loss_weight * retrieval_loss
        if len(spans) and target_prompt_embeds is not None:
            prompt_embeds = self.feature_mapper(spans[:, self.config.num_retrieval_tokens :])
            generation_loss = F.mse_loss(prompt_embeds.float(), target_prompt_embeds.float()) * share
            loss = loss + self.config.generation_loss_weight * generation_loss
        return PegsOutput(
            loss=loss,
            last_hidden_state=hidden_states,
            lm_loss=lm_loss.detach(),
            retrieval_loss=None if retrieval_loss is None else retrieval_loss.detach(),
            generation_loss=None if generation_loss is None else generation_loss.detach(),
            text_embeds=texts,
            image_embeds=images,
        )

    def language_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Summed cross-entropy of labels `(n,)` under hidden states `(n, d)`.

        Scores are made for a few positions at a time, and again in the backward pass: all at once they are the largest tensor of a step.
        """

        def score_and_compare(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.score(states).float(), ids, reduction="sum")

        losses = [
            checkpoint(score_and_compare, states, ids, use_reentrant=False)
            for states, ids in zip(
                hidden_states.split(POSITIONS_AT_ONCE), labels.split(POSITIONS_AT_ONCE), strict=True
            )
        ]
        return torch.stack(losses).sum()

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The language model below a LoRA wrapper, if there is one; LoRA stays active."""
        return (
            self.language_model.get_base_model() if isinstance(self.language_model, PeftModel) else self.language_model
        )

    @property
    def decoder(self) -> nn.Module:
        """The language model without its output layer."""
        return self.causal_lm.get_decoder()

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., V + 3 + r)` of hidden states `(..., d)`."""
        logits = self.added_vocabulary.extend(hidden_states, self.causal_lm.get_output_embeddings()(hidden_states))
        if self.timing_head is None:
            return logits
        gain = self.timing_head(hidden_states.to(self.timing_head.weight)).squeeze(-1).to(logits.device)
        return add_sticker_odds(
            logits, gain, self.config.img_token_ids[0], list_stop_ids(self.generation_config.eos_token_id)
        )

    def get_img_hidden_states(self, input_ids: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Hidden states of the produced stickers' tokens.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): Ids with whole spans `[IMG1]` ... `[IMGr]` only.
            hidden_states (`torch.Tensor` of shape `(B, T, d)`): Last hidden states.

        Returns:
            `torch.Tensor` of shape `(S, r, d)`, in order of appearance.

        """
        first, last = self.config.img_token_ids[0], self.config.img_token_ids[-1]
        in_span = (input_ids >= first) & (input_ids <= last)
        return hidden_states[in_span].view(-1, self.config.num_img_tokens, hidden_states.shape[-1])


def _refuse_pickles(folder: str | os.PathLike, pattern: str) -> None:
    """Raise if a local folder has no file of that pattern, rather than let a library look for pickled weights."""
    if Path(folder).is_dir() and not any(Path(folder).glob(pattern)):
        others = sorted(
            path.name for path in Path(folder).iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
        )
        found = f"only {', '.join(others)}, which are pickles and are not opened" if others else "no weights"
        raise ValueError(f"{folder}: no {pattern} there, {found}.")


def _mismatch(folder: str | os.PathLike, name: str, found: tuple, expected: tuple) -> str:
    return f"{folder}: the tensor {name} has the shape {tuple(found)}, the configuration asks for {tuple(expected)}."


def _load_adapter(language_model: PreTrainedModel, folder: Path) -> PeftModel:
    """Lay a trained, still trainable adapter over a language model; every tensor must be there in its shape."""
    _refuse_pickles(folder, ADAPTER_FILE)
    settings = PeftConfig.from_pretrained(folder)
    settings.inference_mode = False
    model = get_peft_model(language_model, settings)
    weights = load_peft_weights(str(folder), device="cpu")
    for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if name not in weights:
            raise ValueError(f"{folder}: the tensor {name} is missing.")
        if weights[name].shape != tensor.shape:
            raise ValueError(_mismatch(folder, name, weights[name].shape, tensor.shape))
    set_peft_model_state_dict(model, weights)
    return model


def _checkpoint_folder(name_or_path: str | os.PathLike, kwargs: dict) -> Path:
    """The checkpoint's folder, with its adapter; from the Hub, with the arguments `kwargs` of `from_pretrained` that concern it."""
    subfolder = kwargs.get("subfolder", "")
    if not Path(name_or_path).is_dir():
        shared = {name: kwargs[name] for name in ("revision", *DOWNLOAD_ARGUMENTS) if name in kwargs}
        name_or_path = snapshot_download(
            str(name_or_path), allow_patterns=[str(Path(subfolder, ADAPTER_FOLDER, "*"))], **shared
        )
    return Path(name_or_path, subfolder)


PegsModel.register_for_auto_class("AutoModel")

__all__ = ["PegsModel", "PegsOutput", "PegsPreTrainedModel"]
