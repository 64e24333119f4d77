"""Configuration of PEGS."""

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig, Blip2VisionConfig


VARIANTS = ("ret", "gen", "rag")


class PegsConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PegsModel`] (StickerConv, section 4).

    > Parameters that control the backbones

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the causal language model; defaults to Llama's.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision encoder (paper: BLIP-2's EVA-CLIP ViT-g/14); of another one if the dict's `model_type` says so, e.g.
            `clip_vision_model`, `siglip_vision_model` or `siglip2_vision_model`.
        qformer_config (`dict` or `Blip2QFormerConfig`, *optional*):
            Configuration of the Q-Former.
        language_model (`dict`, *optional*):
            Where the frozen language model is found when it is not part of the checkpoint: `hub_id`, and for weights that a
            Python package carries `package` and `gguf_file`. `None` means that the checkpoint holds the language model itself.
        vision_source (`dict`, *optional*):
            Where frozen parts of perception are found when they are not part of the checkpoint: `hub_id` (a folder or Hub id of a BLIP-2, CLIP or SigLIP
            checkpoint) and `parts`, some of `vision_model`, `qformer` and `query_tokens`. `None` means that the checkpoint holds them all.

    > Parameters that control perception

    Args:
        num_query_tokens (`int`, *optional*, defaults to 32):
            Vectors that one input sticker takes in the sequence (paper: section 4.1).

    > Parameters that control the added vocabulary

    Args:
        variant (`str`, *optional*, defaults to `"rag"`):
            `"ret"` sends a retrieved sticker, `"gen"` a drawn one, `"rag"` one drawn from a retrieved one. A model trained as
            `"rag"` can act as any of the three.
        num_retrieval_tokens (`int`, *optional*, defaults to 32):
            Size k of `V_ret` (eq. 2); 0 for a model trained as `"gen"`.
        num_generation_tokens (`int`, *optional*, defaults to 32):
            Size r - k of `V_gen` (eq. 3); 0 for a model trained as `"ret"`.
        first_new_token_id (`int`, *optional*, defaults to 32000):
            Id of the first added token; the added ids are `<Img>`, `</Img>`, `<IMG>`, `[IMG1]` ... `[IMGr]`, in this order.

    > Parameters that control the output heads

    Args:
        retrieval_dim (`int`, *optional*, defaults to 256):
            Size e of the retrieval space (eq. 5).
        retrieval_temperature (`float`, *optional*, defaults to 0.07):
            InfoNCE's tau (eq. 6-7).
        retrieval_text_encoder (`str`, *optional*):
            Sentence encoder in whose space the vision tower was trained, if there is one: captions embedded by it lie in the retrieval space too.
        mapper_hidden_size (`int`, *optional*, defaults to 512):
            Width of the feature mapper.
        mapper_num_layers (`int`, *optional*, defaults to 4):
            Encoder layers, and decoder layers, of the feature mapper (paper: section 4.2).
        mapper_num_heads (`int`, *optional*, defaults to 4):
            Attention heads of the feature mapper.
        mapper_intermediate_size (`int`, *optional*, defaults to 2048):
            Inner width of the feature mapper's feed-forward layers.
        prompt_length (`int`, *optional*, defaults to 77):
            Number L of prompt embeddings that the image decoder takes.
        prompt_dim (`int`, *optional*, defaults to 768):
            Size D of a prompt embedding, the image decoder's `cross_attention_dim`.

        timing_head (`bool`, *optional*, defaults to `False`):
            Whether the log-odds of `[IMG1]` against the end of a reply have a linear head of their own, so that timing can be trained and no word changes.

    > Parameters that control training

    Args:
        lora (`dict`, *optional*):
            Arguments of `peft.LoraConfig` for the language model, `None` for no LoRA (paper: r 8, alpha 16, dropout 0.05, Table 8).
        lm_loss_weight (`float`, *optional*, defaults to 1.0):
            lambda_1 of eq. 10.
        generation_loss_weight (`float`, *optional*, defaults to 1.0):
            lambda_2 of eq. 10.
        retrieval_loss_weight (`float`, *optional*, defaults to 1.0):
            lambda_3 of eq. 10.

    """

    model_type = "pegs"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig, "qformer_config": Blip2QFormerConfig}

    def __init__(
        self,
        text_config: dict | PreTrainedConfig | None = None,
        vision_config: dict | PreTrainedConfig | None = None,
        qformer_config: dict | Blip2QFormerConfig | None = None,
        language_model: dict | None = None,
        vision_source: dict | None = None,
        num_query_tokens: int = 32,
        variant: str = "rag",
        num_retrieval_tokens: int = 32,
        num_generation_tokens: int = 32,
        first_new_token_id: int = 32000,
        retrieval_dim: int = 256,
        retrieval_temperature: float = 0.07,
        retrieval_text_encoder: str | None = None,
        mapper_hidden_size: int = 512,
        mapper_num_layers: int = 4,
        mapper_num_heads: int = 4,
        mapper_intermediate_size: int = 2048,
        prompt_length: int = 77,
        prompt_dim: int = 768,
        timing_head: bool = False,
        lora: dict | None = None,
        lm_loss_weight: float = 1.0,
        generation_loss_weight: float = 1.0,
        retrieval_loss_weight: float = 1.0,
        **kwargs,
    ) -> None:
        if text_config is None:
            text_config = {"model_type": "llama"}
        if isinstance(text_config, dict):
            text_config = CONFIG_MAPPING[text_config.get("model_type", "llama")](**text_config)
        if not isinstance(vision_config, PreTrainedConfig):
            vision_config = {"model_type": Blip2VisionConfig.model_type, **(vision_config or {})}
            vision_config = CONFIG_MAPPING[vision_config["model_type"]](**vision_config)
        if not isinstance(qformer_config, PreTrainedConfig):
            qformer_config = Blip2QFormerConfig(
                **{"encoder_hidden_size": vision_config.hidden_size, **(qformer_config or {})}
            )
        self.text_config, self.vision_config, self.qformer_config = text_config, vision_config, qformer_config
        self.language_model = language_model
        self.vision_source = vision_source
        self.num_query_tokens = num_query_tokens
        self.num_retrieval_tokens = num_retrieval_tokens
        self.num_generation_tokens = num_generation_tokens
        self.first_new_token_id = first_new_token_id
        self.retrieval_dim = retrieval_dim
        self.retrieval_temperature = retrieval_temperature
        self.retrieval_text_encoder = retrieval_text_encoder
        self.mapper_hidden_size = mapper_hidden_size
        self.mapper_num_layers = mapper_num_layers
        self.mapper_num_heads = mapper_num_heads
        self.mapper_intermediate_size = mapper_intermediate_size
        self.prompt_length = prompt_length
        self.prompt_dim = prompt_dim
        self.timing_head = timing_head
        self.lora = lora
        self.lm_loss_weight = lm_loss_weight
        self.generation_loss_weight = generation_loss_weight
        self.retrieval_loss_weight = retrieval_loss_weight
        self.variant = variant
        self.check_variant(variant)
        super().__init__(**kwargs)

    def check_variant(self, variant: str) -> None:
        """
        Check that this model can act as `variant`.

        Raises:
            ValueError: If the variant is unknown, or needs tokens that the model does not have.

        """
        if variant not in VARIANTS:
            raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)}, got {variant!r}.")
        if variant in ("ret", "rag") and not self.num_retrieval_tokens:
            raise ValueError(f"`variant` {variant!r} needs `num_retrieval_tokens` > 0; this model has none.")
        if variant in ("gen", "rag") and not self.num_generation_tokens:
            raise ValueError(f"`variant` {variant!r} needs `num_generation_tokens` > 0; this model has none.")

    @property
    def num_img_tokens(self) -> int:
        """Size r of `V_img`."""
        return self.num_retrieval_tokens + self.num_generation_tokens

    @property
    def new_tokens(self) -> list[str]:
        """The added tokens in the order of their ids."""
        return ["<Img>", "</Img>", "<IMG>", *(f"[IMG{i + 1}]" for i in range(self.num_img_tokens))]

    @property
    def image_token_id(self) -> int:
        """Id of `<IMG>`, the placeholder that a perceived sticker's vectors replace."""
        return self.first_new_token_id + 2

    @property
    def img_token_ids(self) -> list[int]:
        """Ids of `[IMG1]` ... `[IMGr]`, the retrieval tokens first."""
        return list(range(self.first_new_token_id + 3, self.first_new_token_id + 3 + self.num_img_tokens))


PegsConfig.register_for_auto_class()

__all__ = ["VARIANTS", "PegsConfig"]
