"""array_api_strict arrays for mbn."""
