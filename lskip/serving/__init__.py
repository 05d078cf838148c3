"""A server with OpenAI's interface: one engine over a continuous batch, drafts that keep every text as it is."""
