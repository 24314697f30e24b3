"""A program that asks one agent, with nothing but the standard library, and prints what it says."""

import http.client
import json
import os
from urllib.parse import urlsplit

task = json.loads(os.environ["LATENTMEM_TASK"])
address = urlsplit(os.environ["OPENAI_BASE_URL"])
line = http.client.HTTPConnection(address.hostname, address.port, timeout=300)
line.request(
    "POST",
    f"{address.path}/chat/completions",
    json.dumps({"model": "m", "messages": [{"role": "user", "content": task["text"]}]}),
    {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"},
)
print(json.dumps({"answer": json.load(line.getresponse())["choices"][0]["message"]["content"]}))
