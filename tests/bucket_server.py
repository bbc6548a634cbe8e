"""Stand-ins for S3 and for the XML interface of Google Cloud Storage, on loopback.

    python tests/bucket_server.py PORT

Both are moto's S3. Google's interface was made like it. What LanceDB's client (the crate object_store)
says in other words is the condition that an object is not there yet, and the source of a copy; it wants
a generation with every answer, and with `disable_oauth` it signs nothing, so a signature is made up.
"""

import sys

from moto.server import create_backend_app
from werkzeug.serving import run_simple

GOOGLE, AMAZON = "HTTP_X_GOOG_", "HTTP_X_AMZ_"
SIGNED = "AWS4-HMAC-SHA256 Credential=anyone/20260101/us-east-1/s3/aws4_request"


class Front:
    """A WSGI application."""

    def __init__(self):
        self.store = create_backend_app("s3")

    def __call__(self, environ, start_response):
        environ.setdefault("HTTP_AUTHORIZATION", SIGNED)
        wanted = environ.pop(f"{GOOGLE}IF_GENERATION_MATCH", None)
        if wanted is not None:
            assert wanted == "0", f"a condition on generation {wanted}"
            environ["HTTP_IF_NONE_MATCH"] = "*"
        if source := environ.pop(f"{GOOGLE}COPY_SOURCE", None):
            environ[f"{AMAZON}COPY_SOURCE"] = source

        def answer(status, headers, *error):
            return start_response(status, [*headers, ("x-goog-generation", "1")], *error)

        return self.store(environ, answer)


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), Front(), threaded=True)
