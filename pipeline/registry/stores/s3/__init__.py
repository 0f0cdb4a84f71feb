"""A registry in an S3 bucket.

registry.py    settings, `s3://` URLs, and the store that they open
faults.py      what botocore raises -> errors that say what to do
connection.py  the boto3 client: timeouts, retries, deadlines
objects.py     the few requests that a registry makes
"""
