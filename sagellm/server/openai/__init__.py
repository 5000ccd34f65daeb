"""The endpoint that clients and tools made for OpenAI and vLLM can use as they are."""
