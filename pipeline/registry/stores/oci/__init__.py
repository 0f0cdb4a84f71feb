"""A registry that speaks the OCI distribution API: packages are valid images.

registry.py   settings, the API of one repository, and all of it as a store: what readers need
writing.py    the same for publishers
address.py    URL -> repositories and tags
image.py      documents; manifest.json -> tar layers
transport.py  HTTP: credentials, tokens, retries, redirects, errors
"""
