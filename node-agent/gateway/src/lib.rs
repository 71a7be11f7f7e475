//! The bus: OpenAI-compatible HTTP in front of workers
