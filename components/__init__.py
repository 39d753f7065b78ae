"""The components that come with zoo, registered through the same door as a plugin's."""

from __future__ import annotations

from collections.abc import Callable

from zoo.registry.hooks import hookimpl


@hookimpl
def register_components(register: Callable[[str, str, str], None]) -> None:
    """One line per component: its slot, its kind, the dotted path of its Spec."""
    register("model", "decoder", "zoo.components.decoder.spec:DecoderSpec")
    register("block", "prenorm", "zoo.components.decoder.spec:PrenormSpec")
    register("block", "postnorm", "zoo.components.block.spec:PostnormSpec")
    register("block", "sandwich", "zoo.components.block.spec:SandwichSpec")
    register("block", "scaled", "zoo.components.block.spec:ScaledSpec")
    register("block", "sharing", "zoo.components.block.spec:SharingSpec")
    register("shared", "transformer", "zoo.components.shared.spec:TransformerSpec")
    register("vision", "pixtral", "zoo.components.vision.spec:PixtralSpec")
    register("audio", "whisper", "zoo.components.audio.spec:WhisperSpec")
    register("projector", "mlp", "zoo.components.vision.spec:ProjectorSpec")
    register("mixer", "attention", "zoo.components.attention.spec:AttentionSpec")
    register("mixer", "latent_attention", "zoo.components.attention.spec:LatentAttentionSpec")
    register("mixer", "mamba1", "zoo.components.mamba.spec:Mamba1Spec")
    register("mixer", "mamba2", "zoo.components.mamba.spec:Mamba2Spec")
    register("indexer", "lightning", "zoo.components.indexer.spec:LightningIndexerSpec")
    register("indexer", "shared", "zoo.components.indexer.spec:SharedIndexerSpec")
    register("ffn", "gated", "zoo.components.ffn.spec:GatedSpec")
    register("ffn", "clamped", "zoo.components.ffn.spec:ClampedSpec")
    register("ffn", "mlp", "zoo.components.ffn.spec:MLPSpec")
    register("ffn", "moe", "zoo.components.ffn.spec:MoESpec")
    register("router", "softmax_topk", "zoo.components.ffn.spec:SoftmaxTopkSpec")
    register("router", "softmax", "zoo.components.ffn.spec:SoftmaxSpec")
    register("router", "sigmoid", "zoo.components.ffn.spec:SigmoidSpec")
    register("norm", "rms", "zoo.components.norm.spec:RMSSpec")
    register("norm", "rms_plus_one", "zoo.components.norm.spec:RMSPlusOneSpec")
    register("norm", "layer", "zoo.components.norm.spec:LayerNormSpec")
    register("rope", "default", "zoo.components.rope.spec:DefaultRopeSpec")
    register("rope", "linear", "zoo.components.rope.spec:LinearRopeSpec")
    register("rope", "llama3", "zoo.components.rope.spec:Llama3RopeSpec")
    register("rope", "yarn", "zoo.components.rope.spec:YarnRopeSpec")
    register("rope", "longrope", "zoo.components.rope.spec:LongRopeSpec")
    register("cache", "full", "zoo.components.cache.spec:FullCacheSpec")
    register("cache", "window", "zoo.components.cache.spec:WindowCacheSpec")
    register("cache", "latent", "zoo.components.cache.spec:LatentCacheSpec")
    register("cache", "shared", "zoo.components.cache.spec:SharedCacheSpec")
    register("cache", "recurrent", "zoo.components.cache.spec:RecurrentCacheSpec")
