"""A registry in an S3 bucket.

registry.py    settings, and the store that they open
address.py     `s3://` URL -> bucket and prefix
faults.py      what botocore raises -> errors that say what to do
connection.py  the boto3 client: timeouts, retries, deadlines
objects.py     the few requests that a registry makes
"""
