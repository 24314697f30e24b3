"""Programs of a few lines, as functions that workers call: some play well, some misbehave."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor


def post(path, body, key=None, headers=None):
    """Send JSON to the episode's address, with plain urllib; return the answer."""
    request = urllib.request.Request(
        path if path.startswith("http") else os.environ["OPENAI_BASE_URL"] + path,
        json.dumps(body).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {key or os.environ['OPENAI_API_KEY']}",
            **(headers or {}),
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def say(system, user, role=None, headers=None, **more):
    """Ask one agent; return what it says."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    named = {"X-LatentMem-Role": role} if role else {}
    body = {"model": "any", "messages": messages, **more}
    answer = post("/chat/completions", body, headers={**named, **(headers or {})})
    return answer["choices"][0]["message"]["content"]


def tell(value, agent=None):
    """Give a reward."""
    data = {"value": value} | ({"agent": agent} if agent else {})
    post(os.environ["LATENTMEM_SESSION_URL"] + "/events", {"event_type": "reward", "data": data})


def plays_team(task, name):
    """Do just what a fixed team of the package does."""
    from latentmem.teams.team import load_team

    turn = load_team(name).turn(task["text"], task["instructions"], [])
    calls = next(turn)
    try:
        while True:
            calls = turn.send([say(call.system, call.user, call.role.name) for call in calls])
    except StopIteration as stop:
        return stop.value


def plays_autogen(task):
    return plays_team(task, "autogen")


def plays_pair(task):
    return plays_team(task, "pair")


def plays_solo(task):
    return plays_team(task, "solo")


def planner_and_solver(task):
    """Two agents, the second of whom reads the first; both are known by their system messages alone."""
    plan = say("You plan.", task["text"])
    return say("You solve.", f"{task['text']}\nThe plan: {plan}")


def tells_what_it_is_told(task):
    """Asks the same twice, and returns what the answers say beside the response."""
    told = []
    for _ in range(2):
        body = {"model": "any", "messages": [{"role": "user", "content": task["text"]}]}
        answer = post("/chat/completions", body, headers={"X-LatentMem-Role": "planner"})
        own = answer["latentmem"]
        told.append({"usage": answer["usage"], "known": own["role_is_known"], "warnings": own["warnings"]})
    return json.dumps(told)


def uses_openai(task):
    """The same with the official client."""
    from openai import OpenAI

    with OpenAI() as client:

        def ask(system, user):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            done = client.chat.completions.create(model="gpt-x", messages=messages, temperature=0.3, max_tokens=3)
            return done.choices[0].message.content

        plan = ask("You plan.", task["text"])
        return ask("You solve.", f"{task['text']}\nThe plan: {plan}")


def streams(task):
    """Reads the response as it comes."""
    from openai import OpenAI

    with OpenAI() as client:
        messages = [{"role": "user", "content": task["text"]}]
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(model="m", messages=messages, stream=True)
            if chunk.choices
        ]
    return "".join(pieces)


def all_at_once(task):
    """Many agents side by side, each in a conversation of three requests, then one who reads them."""

    def talk(number):
        messages = [
            {"role": "system", "content": f"You are agent {number % 2}."},
            {"role": "user", "content": str(number)},
        ]
        for _ in range(3):
            answer = post("/chat/completions", {"model": "m", "messages": messages})["choices"][0]["message"]
            messages += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "Go on."}]
        return messages[-2]["content"]

    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(talk, range(4)))
    return say("You conclude.", "\n".join(said))


def rewards_agents(task):
    """Tells rewards for its two agents."""
    said = planner_and_solver(task)
    tell(1.0 if len(said) % 2 else 0.0, "planner")
    tell(0.5, "solver")
    tell(0.25)
    return said


def retries(task):
    """Sends one request three times, as clients do after a lost connection."""
    key = {"Idempotency-Key": "one"}
    first, second = (say("You say.", task["text"], headers=key) for _ in range(2))
    messages = [{"role": "system", "content": "You say."}, {"role": "user", "content": task["text"]}]
    body = {"model": "any", "messages": messages}
    post("/chat/completions", body, headers={"X-Stainless-Retry-Count": "0"})
    third = post("/chat/completions", body, headers={"X-Stainless-Retry-Count": "1"})
    assert first == second
    return third["choices"][0]["message"]["content"]


# Those that misbehave; each does so at tasks whose text says it, and plays well at others.


def misbehaves(task):
    """Do what the task's text says."""
    say("You speak.", task["text"])
    return BEHAVIOURS.get(task["text"].split()[0], lambda task: "well")(task)


def raises(task):
    raise ValueError("the program broke\nin two lines")


def crashes(task):
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(task):
    threading.Event().wait()


def returns_nothing(task):
    return None


def forks(task):
    """Leave a process behind, in a session of its own, that goes on calling."""
    code = "import time\nwhile True: time.sleep(0.01)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    with open(os.environ["LEFT_BEHIND"], "a") as file:
        file.write(f"{child.pid}\n")
    os.kill(os.getpid(), signal.SIGKILL)


def calls_late(task):
    """Leave a thread behind that calls when the episode is over, and keeps what it was told."""
    key, address = os.environ["OPENAI_API_KEY"], os.environ["OPENAI_BASE_URL"]

    def call():
        looking = urllib.request.Request(f"{address}/models", headers={"Authorization": f"Bearer {key}"})
        while True:  # until the episode is over
            try:
                urllib.request.urlopen(looking, timeout=60).close()
            except urllib.error.HTTPError as error:
                error.close()
                break
            time.sleep(0.01)
        try:
            post(f"{address}/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "late"}]}, key)
        except urllib.error.HTTPError as error:
            with open(os.environ["TOLD"] + ".new", "w") as file:
                file.write(f"{error.code} {json.load(error)['error']['code']}\n")
            os.rename(os.environ["TOLD"] + ".new", os.environ["TOLD"])

    threading.Thread(target=call, daemon=True).start()
    return "well"


def hears_of_it(task):
    """End when the late call of an earlier episode was told something."""
    until = time.monotonic() + 60
    while not os.path.exists(os.environ["TOLD"]) and time.monotonic() < until:
        time.sleep(0.01)
    return "well"


def uses_anothers_address(task):
    """Wait for the address of another episode, and call it with the own key."""
    while not os.path.exists(os.environ["ADDRESS"]):
        time.sleep(0.01)
    with open(os.environ["ADDRESS"]) as file:
        address = file.read()
    try:
        post(f"{address}/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "hello"}]})
    finally:
        with open(os.environ["DONE"], "w"):
            pass
    return "well"


def tells_its_address(task):
    """Tell the own address to others, and go on when they have used it."""
    with open(os.environ["ADDRESS"] + ".new", "w") as file:
        file.write(os.environ["OPENAI_BASE_URL"])
    os.rename(os.environ["ADDRESS"] + ".new", os.environ["ADDRESS"])
    while not os.path.exists(os.environ["DONE"]):
        time.sleep(0.01)
    return "well"


def goes_away(task):
    """Close the connection while the agent speaks."""
    import http.client
    from urllib.parse import urlsplit

    parts = urlsplit(os.environ["OPENAI_BASE_URL"])
    line = http.client.HTTPConnection(parts.hostname, parts.port)
    body = {"model": "m", "messages": [{"role": "user", "content": "cut"}], "stream": True}
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    line.request("POST", f"{parts.path}/chat/completions", json.dumps(body), headers)
    line.close()
    return "well"


def tells_rewards(task):
    """Misspells the type of a reward, and answers with what it is told."""
    try:
        post(os.environ["LATENTMEM_SESSION_URL"] + "/events", {"event_type": "rewards", "data": {"value": 1}})
    except urllib.error.HTTPError as error:
        return f"{error.code} {json.load(error)['error']['message']}"


def has_no_v1(task):
    """Leaves `/v1` out, and answers with what it is told."""
    try:
        post(os.environ["OPENAI_BASE_URL"].removesuffix("/v1") + "/chat/completions", {"model": "x", "messages": []})
    except urllib.error.HTTPError as error:
        return f"{error.code} {json.load(error)['error']['message']}"


def fails_after_a_call(task):
    say("You plan.", task["text"])
    raise RuntimeError("the plan is bad")


def makes_no_call(task):
    return "well"


BEHAVIOURS = {
    function.__name__: function
    for function in (
        raises,
        crashes,
        hangs,
        returns_nothing,
        forks,
        calls_late,
        hears_of_it,
        uses_anothers_address,
        tells_its_address,
        goes_away,
    )
}
