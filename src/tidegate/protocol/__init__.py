"""The OpenAI dialect, as vLLM speaks it: bodies in, chunks and errors out.

``http_front`` is the HTTP front of its servers; the other modules do no I/O.
"""
