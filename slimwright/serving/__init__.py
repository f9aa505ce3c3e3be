"""The server: continuous batching, OpenAI's HTTP interface, adapters at run time, a page to look at."""
