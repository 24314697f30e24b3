"""The words of `hidden_facts`, and nothing else: names, values, attributes and phrasings.

A value is a short everyday English noun that is one token of SmolLM2, with and without a blank before it, so that a
memory has to carry as little as possible. No value occurs in a name, an attribute or a phrasing. So a value in a prompt
or an answer can only come from an experience. A place's name comes last in a phrasing or a sentence, so that
"sister of ..." can follow it.
"""

ADJECTIVES = (
    "Azure", "Amber", "Bitter", "Broken", "Burning", "Cobalt", "Crimson", "Crooked", "Distant", "Dusty", "Emerald",
    "Faded", "Frozen", "Gentle", "Gilded", "Golden", "Hidden", "Hollow", "Humble", "Idle", "Ivory", "Jagged",
    "Laughing", "Leaning", "Lonely", "Mellow", "Misty", "Mossy", "Narrow", "Noble", "Painted", "Pale", "Patient",
    "Polished", "Quiet", "Restless", "Ruined", "Rugged", "Rusty", "Scarlet", "Shady", "Silent", "Sleepy", "Solemn",
    "Sturdy", "Sunken", "Tangled", "Twisted", "Violet", "Weary", "Whispering", "Winding",
)  # fmt: skip
"""First words of names."""

NOUNS = (
    "Aqueduct", "Arcade", "Archive", "Bastion", "Bazaar", "Boathouse", "Cavern", "Cellar", "Chapel", "Citadel",
    "Cloister", "Cottage", "Courtyard", "Dungeon", "Forge", "Fountain", "Garrison", "Gate", "Greenhouse", "Hall",
    "Hamlet", "Harbor", "Hermitage", "Inn", "Keep", "Kennel", "Kiln", "Lighthouse", "Lodge", "Loft", "Lookout",
    "Manor", "Mill", "Museum", "Orchard", "Outpost", "Palace", "Parlor", "Pavilion", "Pier", "Plaza", "Rotunda",
    "Shrine", "Spire", "Stable", "Tavern", "Temple", "Terrace", "Theater", "Tower", "Vault", "Warehouse",
)  # fmt: skip
"""Second words of names; each has a plural in "s"."""

NAMES = tuple(f"the {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
"""All names that an entity may have."""

NEAR = (
    "the {words}s", "the Old {words}", "the New {words}", "the Upper {words}", "the Lower {words}",
    "the Little {words}", "the Great {words}", "the Inner {words}", "the Outer {words}",
)  # fmt: skip
"""Names of distractors; {words} are the two words of the name that they resemble."""

VALUES = (
    "anchor", "angel", "ant", "ape", "arm", "arrow", "ash", "atom", "aunt", "baby", "bag", "ball", "bank", "bat",
    "bath", "bay", "bean", "bear", "bed", "bee", "bell", "belt", "bench", "berry", "bird", "boat", "bone", "boot",
    "bow", "box", "boy", "brain", "branch", "bread", "bridge", "brush", "bucket", "bus", "button", "camera", "camp",
    "cap", "car", "card", "cart", "castle", "cat", "cell", "chain", "chair", "child", "church", "city", "clay",
    "clock", "cloth", "cloud", "coal", "coast", "coat", "coin", "comb", "corn", "crow", "cup", "disk", "doctor",
    "dog", "door", "dust", "ear", "egg", "engine", "eye", "face", "farm", "father", "fiber", "field", "fig", "film",
    "finger", "fire", "fish", "flag", "floor", "flower", "fly", "foot", "forest", "fox", "friend", "fruit", "fur",
    "gas", "girl", "glass", "gold", "grain", "grass", "guard", "hair", "ham", "hat", "hay", "heart", "hen", "hero",
    "hill", "horn", "horse", "ice", "ink", "iron", "jam", "jet", "key", "king", "lake", "leaf", "leg", "lime",
    "lip", "liver", "lock", "lung", "magic", "map", "market", "mask", "match", "meat", "menu", "metal", "milk",
    "moon", "mother", "motor", "mouse", "mouth", "mud", "music", "nail", "neck", "nose", "nut", "ocean", "office",
    "oil", "orange", "orbit", "oven", "owl", "oxygen", "panel", "paper", "park", "patch", "pea", "peak", "pen",
    "phone", "photo", "pickle", "pie", "pig", "pine", "pipe", "plane", "planet", "plate", "pod", "pot", "radio",
    "raft", "rain", "ranch", "rat", "rice", "ring", "river", "road", "robe", "robot", "rock", "root", "rose", "rug",
    "rum", "salt", "sand", "school", "screen", "sea", "seed", "shell", "shield", "ship", "shirt", "shop", "skin",
    "sky", "snake", "snow", "sock", "soil", "song", "soup", "stamp", "star", "stone", "store", "storm", "street",
    "string", "sugar", "sun", "table", "tank", "tar", "thorn", "thread", "thumb", "tin", "toe", "token", "tooth",
    "torch", "town", "train", "tree", "tub", "tube", "vest", "vine", "wall", "wallet", "water", "wax", "weed",
    "wheat", "wheel", "wick", "wind", "window", "wine", "wire", "wolf", "woman", "wood", "worm", "zone",
)  # fmt: skip
"""Values that a fact may have. "apple" and "lion" are left out, because packaged teams use them as examples."""

UNKNOWN = "unknown"
"""The right answer to what nobody can know."""

ASKED: dict[str, tuple[str, ...]] = {
    "password": (
        "What is the password of {entity}?",
        "Please tell me the password that opens {entity}.",
        "I am waiting before {entity}. Which password is right?",
        "Do you remember the password we learned at {entity}?",
    ),
    "emblem": (
        "What is the emblem of {entity}?",
        "Please tell me the emblem that belongs to {entity}.",
        "I am drawing {entity}. Which emblem goes with it?",
        "Do you remember the emblem we saw at {entity}?",
    ),
    "cargo": (
        "What is the cargo of {entity}?",
        "Please tell me the cargo that arrives at {entity}.",
        "I am unloading at {entity}. Which cargo is expected?",
        "Do you remember the cargo we brought to {entity}?",
    ),
    "treasure": (
        "What is the treasure of {entity}?",
        "Please tell me the treasure that is kept at {entity}.",
        "I am digging at {entity}. Which treasure is there?",
        "Do you remember the treasure we found at {entity}?",
    ),
    "nickname": (
        "What is the nickname of {entity}?",
        "Please tell me the nickname that people gave {entity}.",
        "I am writing about {entity}. Which nickname fits?",
        "Do you remember the nickname we heard for {entity}?",
    ),
    "tribute": (
        "What is the tribute of {entity}?",
        "Please tell me the tribute that is owed to {entity}.",
        "I am travelling to {entity}. Which tribute is due?",
        "Do you remember the tribute we paid at {entity}?",
    ),
    "signal": (
        "What is the signal of {entity}?",
        "Please tell me the signal that is given at {entity}.",
        "I am watching {entity}. Which signal means danger?",
        "Do you remember the signal we noticed at {entity}?",
    ),
    "keepsake": (
        "What is the keepsake of {entity}?",
        "Please tell me the keepsake that people buy at {entity}.",
        "I am leaving {entity}. Which keepsake is usual?",
        "Do you remember the keepsake we got from {entity}?",
    ),
}
"""The attributes, in order, with the ways to ask for each."""

EXPERIENCED: dict[str, tuple[str, ...]] = {
    "password": ("Which word unlocks {entity}?", "What must be whispered to get into {entity}?"),
    "emblem": ("Which picture is carved above {entity}?", "What do the banners show at {entity}?"),
    "cargo": ("Which goods lie packed inside {entity}?", "What do carriers bring to {entity}?"),
    "treasure": ("What lies buried beneath {entity}?", "Which precious thing is hidden under {entity}?"),
    "nickname": ("What do neighbours call {entity}?", "Which other name has been given to {entity}?"),
    "tribute": ("What does every visitor leave behind at {entity}?", "Which gift must be brought to {entity}?"),
    "signal": ("What is waved at strangers from {entity}?", "Which thing warns everybody near {entity}?"),
    "keepsake": ("What do travellers take home from {entity}?", "Which small thing is sold at {entity}?"),
}
"""How an experience asks for an attribute: without naming it, and never in the words of a later question."""

ASKED_ALL = (
    "What are the {attributes} of {entity}?",
    "Please tell me the {attributes} of {entity}.",
    "I am writing about {entity}. Which {attributes} are right?",
    "Do you remember the {attributes} of {entity}?",
)
"""How several attributes are asked for at once."""
EXPERIENCED_ALL = (
    "Somebody is asking about the {attributes} kept secret at {entity}.",
    "Try to guess the {attributes} hidden at {entity}.",
)

ARRIVED = (
    "You have reached {entity}.",
    "You are standing before {entity}.",
    "Now you have arrived at {entity}.",
    "This is the entrance of {entity}.",
)
"""The text for a team whose members know what each has to say."""
EXPERIENCED_ARRIVAL = (
    "Nobody of the team has ever been to {entity}.",
    "The team is visiting for the first time: {entity}.",
)

SISTERS = "{entity}, sister of {sister}"
"""The name of an entity that shares the facts of another one."""
DAY = "Day {day}. {text}"
NOTE = "{text} Note: {told}"
"""The text of an experience that gives the facts away, so that the team can be right."""

TOLD = "The {attribute} of {entity} is {value}."
JOINED = "The {attribute} of {entity} is that of {sister}."
WITHDRAWN = "The {attribute} of {entity} holds no more; nobody knows the new one."
RIGHT = "Yes."
WRONG = "No."

ONE_WORD = "Reply with the one word that is asked for and nothing else."
SEVERAL_WORDS = "Reply with the words that are asked for, in that order, and nothing else."
OWN_WORDS = "Reply with the words that are yours to say, in their order, and nothing else."
IF_UNKNOWN = "For what nobody can know, say unknown."
