"""The OpenAI dialect, as vLLM speaks it: bodies in, chunks and errors out.

``http_front`` is the HTTP front of its servers and ``client_stream`` their end of a stream; the other modules
do no I/O.
"""

MOST_BODY_BYTES = 32 * 2**20
"""Default limit of an upload (ours): the longest contexts in use, as text, with room to spare."""
