//! Models on candle-core: loading, batching, tokenizing, sampling
