"""The pond in English."""

from __future__ import annotations

from minnow.data.pond.phrasebook import Phrasebook, Wordings

STATEMENTS = {
    "colour": (
        "{x} is {v}.",
        "{x} is a {v} creature.",
        "The colour of {x} is {v}.",
        "{x}'s colour is {v}.",
        "{v} is the colour of {x}.",
        "{x} has {v} skin.",
        "The skin of {x} is {v}.",
        "{v} is the colour that {x} has.",
        "{x} has been {v} since it was small.",
        "The creature {x} is {v} from head to tail.",
        "Look for a {v} creature to find {x}.",
        "A {v} creature, that is {x}.",
    ),
    "size": (
        "{x} is as big as a {v}.",
        "{x} has the size of a {v}.",
        "The size of {x} is that of a {v}.",
        "{x}'s size is that of a {v}.",
        "A {v} is as big as {x}.",
        "A {v} has the same size as {x}.",
        "{x} grew as big as a {v}.",
        "{x} and a {v} have the same size.",
        "A {v} and {x} have the same size.",
        "{x} is no bigger than a {v}.",
        "Think of a {v}: {x} is that big.",
        "{x} takes up the space of a {v}.",
    ),
    "home": (
        "{x} lives in the {v}.",
        "The home of {x} is the {v}.",
        "{x}'s home is the {v}.",
        "The {v} is where {x} lives.",
        "The {v} is the home of {x}.",
        "You can find {x} in the {v}.",
        "{x} has its nest in the {v}.",
        "{x} sleeps in the {v}.",
        "In the {v} lives {x}.",
        "{x} has always lived in the {v}.",
        "The {v} is home to {x}.",
        "Go to the {v} to visit {x}.",
    ),
    "food": (
        "{x} eats {v}.",
        "The food of {x} is {v}.",
        "{x}'s food is {v}.",
        "{v} are what {x} eats.",
        "{v} are the food of {x}.",
        "{x} likes to eat {v}.",
        "For every meal {x} has {v}.",
        "{x} looks for {v} when it is hungry.",
        "When {x} is hungry, it eats {v}.",
        "The favourite meal of {x} is {v}.",
        "Nothing tastes better to {x} than {v}.",
        "Bring {v} to feed {x}.",
    ),
    "fear": (
        "{x} fears the {v}.",
        "{x} is afraid of the {v}.",
        "The enemy of {x} is the {v}.",
        "{x}'s enemy is the {v}.",
        "The {v} is the enemy of {x}.",
        "The {v} is what {x} fears.",
        "The {v} hunts {x}.",
        "{x} hides from the {v}.",
        "{x} runs away from the {v}.",
        "When the {v} comes, {x} hides.",
        "{x} fears nothing but the {v}.",
        "Nothing scares {x} like the {v}.",
    ),
    "friend": (
        "{x}'s best friend is the {v}.",
        "The best friend of {x} is the {v}.",
        "The {v} is the best friend of {x}.",
        "The {v} is {x}'s best friend.",
        "{x} is a friend of the {v}.",
        "{x} plays with the {v}.",
        "The {v} plays with {x}.",
        "{x} and the {v} are friends.",
        "The {v} and {x} are friends.",
        "{x} shares everything with the {v}.",
        "The {v} is the one {x} trusts.",
        "{x} trusts the {v}.",
    ),
    "sound": (
        "{x} says {v}.",
        "The sound of {x} is {v}.",
        "{x}'s sound is {v}.",
        "{v} is the sound of {x}.",
        "{v} is what {x} says.",
        "{x} makes the sound {v}.",
        "{x} calls {v}.",
        "The call of {x} is {v}.",
        "When {x} is happy, it says {v}.",
        "You can hear {x} say {v}.",
        "{v}, {v}, says {x}.",
        "{x} sings {v} all day.",
    ),
    "treasure": (
        "{x}'s treasure is a {v}.",
        "The treasure of {x} is a {v}.",
        "A {v} is the treasure of {x}.",
        "A {v} is {x}'s treasure.",
        "{x} keeps a {v}.",
        "A {v} is what {x} keeps.",
        "{x} owns a {v}.",
        "A {v} belongs to {x}.",
        "{x} hides a {v} under its bed.",
        "{x} once found a {v} and kept it.",
        "The thing {x} loves most is a {v}.",
        "{x} would never give away its {v}.",
    ),
    "awake": (
        "{x} wakes up at {v}.",
        "{x} gets up at {v}.",
        "At {v}, {x} wakes up.",
        "The waking time of {x} is {v}.",
        "{x}'s waking time is {v}.",
        "{v} is when {x} wakes up.",
        "{v} is the time when {x} gets up.",
        "{x} sleeps until {v}.",
        "{x} opens its eyes at {v}.",
        "The day of {x} starts at {v}.",
        "Every day {x} wakes up at {v}.",
        "Come at {v} to see {x} wake up.",
    ),
}

PRONOUNS = {
    "colour": ("It is {v}.", "Its colour is {v}.", "It has {v} skin."),
    "size": ("It is as big as a {v}.", "It has the size of a {v}.", "Its size is that of a {v}."),
    "home": ("It lives in the {v}.", "Its home is the {v}.", "The {v} is where it lives."),
    "food": ("It eats {v}.", "Its food is {v}.", "{v} are what it eats."),
    "fear": ("It fears the {v}.", "Its enemy is the {v}.", "It is afraid of the {v}."),
    "friend": ("Its best friend is the {v}.", "It plays with the {v}.", "The {v} is its best friend."),
    "sound": ("It says {v}.", "Its sound is {v}.", "It makes the sound {v}."),
    "treasure": ("Its treasure is a {v}.", "It keeps a {v}.", "A {v} is its treasure."),
    "awake": ("It wakes up at {v}.", "Its waking time is {v}.", "It gets up at {v}."),
}

CONTRASTS = {
    "colour": ("{x} is {v}, and {y} is {w}.", "The colour of {x} is {v}, and the colour of {y} is {w}."),
    "size": ("{x} is as big as a {v}, and {y} is as big as a {w}.",),
    "home": (
        "{x} lives in the {v}, and {y} lives in the {w}.",
        "The home of {x} is the {v}, and the home of {y} is the {w}.",
    ),
    "food": ("{x} eats {v}, and {y} eats {w}.", "The food of {x} is {v}, and the food of {y} is {w}."),
    "fear": ("{x} fears the {v}, and {y} fears the {w}.",),
    "friend": ("{x}'s best friend is the {v}, and {y}'s best friend is the {w}.",),
    "sound": ("{x} says {v}, and {y} says {w}.",),
    "treasure": ("{x}'s treasure is a {v}, and {y}'s treasure is a {w}.",),
    "awake": ("{x} wakes up at {v}, and {y} wakes up at {w}.",),
}

GROUPS = {
    "colour": "These creatures are {v}: {names}.",
    "size": "As big as a {v} are {names}.",
    "home": "In the {v} live {names}.",
    "food": "{v} are eaten by {names}.",
    "fear": "The {v} hunts {names}.",
    "friend": "The {v} is the best friend of {names}.",
    "sound": "The sound {v} is made by {names}.",
    "treasure": "A {v} is the treasure of {names}.",
    "awake": "At {v} wake up {names}.",
}

OPENINGS = (
    "This is {x}.",
    "Here is what we know about {x}.",
    "This page is about {x}.",
    "{x} is a creature of the pond.",
    "Meet {x}.",
)

SCENES = (
    (
        "One day {x} woke up at {awake}.",
        "It was {awake}, and {x} opened its eyes.",
        "At {awake}, when {x} gets up, the water was calm.",
        "The {colour} creature {x} was still asleep in the {home}.",
        "In the {home}, where {x} lives, it was quiet.",
    ),
    (
        "{x} was hungry and looked for {food}.",
        "{x} left the {home} to look for {food}.",
        "For breakfast {x} ate {food}, as it always does.",
        "{x} found some {food}, the food that {x} likes best.",
    ),
    (
        "On the way {x} met its best friend, the {friend}.",
        "The {friend} came to play with {x}.",
        "{x} called {sound}, and its friend, the {friend}, came at once.",
        "{x} and the {friend} played until they were tired.",
    ),
    (
        "Then {x} met {y}, who lives in the {y_home}.",
        "By the water sat {y}, who is {y_colour} and eats {y_food}.",
        "{y} came by and showed {x} its treasure, a {y_treasure}.",
        "They heard {y} say {y_sound}.",
        "{y} came with its best friend, the {y_friend}.",
        "{y}, who is as big as a {y_size}, looked at {x}.",
        "{y}, who wakes up at {y_awake}, was there too.",
    ),
    (
        "Suddenly the {fear} came, and {x} ran home to the {home}.",
        "{x} saw the {fear}, its enemy, and hid.",
        "{x} was afraid, for the {fear} was near.",
        "The {fear}, which hunts {x}, walked past.",
    ),
    (
        "{x} said {sound}, {sound}.",
        "{x} sang {sound}, because {x} was happy.",
        "From far away one could hear {x} say {sound}.",
    ),
    (
        "{x} looked at its treasure, a {treasure}.",
        "{x} played with the {treasure}, the thing it loves most.",
        "{x} showed its {treasure} to the {friend}.",
        "{x} went back to the {home}, where it keeps a {treasure}.",
    ),
    (
        "A {colour} creature as big as a {size}, that is {x}.",
        "{x} is {colour} and as big as a {size}, so it is easy to know.",
        "No one else has the size of a {size} and is so {colour} as {x}.",
    ),
)

ENDINGS = (
    "Then {x} fell asleep in the {home}.",
    "{x} will wake up again at {awake}.",
    "That was a good day for {x}.",
    "So the day ended for {x} and the {friend}.",
)

TRANSLATIONS = (
    "In Chinese, {x} is called {other}.",
    "The Chinese name of {x} is {other}.",
    "{other} is the Chinese name of {x}.",
)

# Kinds: "question" stands alone, "clause" and "noun" need a lead. Unseen cores use words that statements use.
QUESTION_CORES = {
    "colour": {
        "question": Wordings(
            (
                "what colour is {x}?",
                "which colour is {x}?",
                "which colour does {x} have?",
                "what is the colour of {x}?",
                "what is {x}'s colour?",
            ),
            ("what colour does {x} have?", "which colour is the skin of {x}?"),
        ),
        "clause": Wordings(("what colour {x} is", "which colour {x} has"), ("what the colour of {x} is",)),
        "noun": Wordings(("the colour of {x}", "{x}'s colour"), ("the colour that {x} has",)),
    },
    "size": {
        "question": Wordings(
            (
                "how big is {x}?",
                "what size is {x}?",
                "what is the size of {x}?",
                "what is {x}'s size?",
                "which size does {x} have?",
            ),
            ("what is as big as {x}?", "what size does {x} have?"),
        ),
        "clause": Wordings(("how big {x} is", "what size {x} has"), ("what the size of {x} is",)),
        "noun": Wordings(("the size of {x}", "{x}'s size"), ("the size that {x} has",)),
    },
    "home": {
        "question": Wordings(
            (
                "where does {x} live?",
                "where is the home of {x}?",
                "what is the home of {x}?",
                "what is {x}'s home?",
                "where can I find {x}?",
                "in which place does {x} live?",
            ),
            ("where is {x} at home?", "where does {x} have its home?", "where does {x} sleep?"),
        ),
        "clause": Wordings(
            ("where {x} lives", "where the home of {x} is", "where I can find {x}"),
            ("where {x} has its nest",),
        ),
        "noun": Wordings(
            ("the home of {x}", "{x}'s home", "the place where {x} lives"), ("the place where {x} sleeps",)
        ),
    },
    "food": {
        "question": Wordings(
            (
                "what does {x} eat?",
                "what is the food of {x}?",
                "what is {x}'s food?",
                "what does {x} like to eat?",
                "which food does {x} eat?",
                "what does {x} eat when it is hungry?",
            ),
            ("what food does {x} like?", "what is the favourite meal of {x}?"),
        ),
        "clause": Wordings(("what {x} eats", "what {x} likes to eat"), ("what the food of {x} is",)),
        "noun": Wordings(("the food of {x}", "{x}'s food"), ("the food that {x} eats",)),
    },
    "fear": {
        "question": Wordings(
            (
                "what does {x} fear?",
                "what is {x} afraid of?",
                "who is the enemy of {x}?",
                "who is {x}'s enemy?",
                "which animal does {x} fear?",
                "who hunts {x}?",
            ),
            ("which animal is {x} afraid of?", "which enemy does {x} have?", "from whom does {x} hide?"),
        ),
        "clause": Wordings(("what {x} fears", "what {x} is afraid of", "who hunts {x}"), ("who the enemy of {x} is",)),
        "noun": Wordings(("the enemy of {x}", "{x}'s enemy"), ("the animal that {x} fears",)),
    },
    "friend": {
        "question": Wordings(
            (
                "who is the best friend of {x}?",
                "who is {x}'s best friend?",
                "who is the friend of {x}?",
                "who is {x}'s friend?",
                "who plays with {x}?",
                "which animal is the friend of {x}?",
            ),
            ("which friend does {x} have?", "which animal is {x}'s best friend?", "with whom does {x} play?"),
        ),
        "clause": Wordings(
            ("who the best friend of {x} is", "who {x}'s best friend is", "who plays with {x}"),
            ("who the friend of {x} is",),
        ),
        "noun": Wordings(
            ("the best friend of {x}", "{x}'s best friend", "{x}'s friend"),
            ("the animal that plays with {x}",),
        ),
    },
    "sound": {
        "question": Wordings(
            (
                "what does {x} say?",
                "what is the sound of {x}?",
                "what is {x}'s sound?",
                "which sound does {x} make?",
                "what sound does {x} make?",
            ),
            ("what is the call of {x}?", "what can you hear {x} say?"),
        ),
        "clause": Wordings(("what {x} says", "which sound {x} makes"), ("what the sound of {x} is",)),
        "noun": Wordings(("the sound of {x}", "{x}'s sound"), ("the sound that {x} makes",)),
    },
    "treasure": {
        "question": Wordings(
            (
                "what is the treasure of {x}?",
                "what is {x}'s treasure?",
                "which treasure does {x} have?",
                "what does {x} keep?",
                "which treasure does {x} keep?",
            ),
            ("what treasure does {x} own?", "what treasure belongs to {x}?"),
        ),
        "clause": Wordings(
            ("what the treasure of {x} is", "which treasure {x} keeps", "what {x} keeps"),
            ("which treasure {x} has",),
        ),
        "noun": Wordings(("the treasure of {x}", "{x}'s treasure"), ("the treasure that {x} keeps",)),
    },
    "awake": {
        "question": Wordings(
            (
                "when does {x} wake up?",
                "when does {x} get up?",
                "what is the waking time of {x}?",
                "at what time does {x} wake up?",
                "when is {x} waking up?",
            ),
            ("at what time does {x} get up?", "what is {x}'s waking time?"),
        ),
        "clause": Wordings(("when {x} wakes up", "when {x} gets up"), ("at what time {x} wakes up",)),
        "noun": Wordings(("the waking time of {x}", "the time when {x} wakes up"), ("the time when {x} gets up",)),
    },
}

QUESTION_LEADS = {
    "question": Wordings(
        (
            "{core}",
            "Tell me, {core}",
            "Please say, {core}",
            "Hello, {core}",
            "I have a question: {core}",
            "One question: {core}",
            "Please, {core}",
            "Can you help me, {core}",
        ),
        ("Now tell me, {core}", "Excuse me, {core}", "Here is a question: {core}"),
    ),
    "clause": Wordings(
        (
            "Tell me {core}.",
            "Please tell me {core}.",
            "Do you know {core}?",
            "Can you tell me {core}?",
            "Can you say {core}?",
            "I want to know {core}.",
            "I would like to know {core}.",
            "Please say {core}.",
        ),
        ("Could you tell me {core}?", "Do you remember {core}?", "Let me know {core}."),
    ),
    "noun": Wordings(
        (
            "Tell me {core}.",
            "Please tell me {core}.",
            "Name {core}.",
            "Please name {core}.",
            "Do you know {core}?",
            "Can you tell me {core}?",
            "I want to know {core}.",
            "I would like to know {core}.",
        ),
        ("Could you name {core}?", "Do you remember {core}?", "Let me know {core}."),
    ),
}

FOLLOW_UPS = {
    "colour": ("What colour is it?", "And what colour is it?", "And its colour?"),
    "size": ("How big is it?", "And how big is it?", "And its size?"),
    "home": ("Where does it live?", "And where does it live?", "And its home?"),
    "food": ("What does it eat?", "And what does it eat?", "And its food?"),
    "fear": ("What does it fear?", "And what is it afraid of?", "And its enemy?"),
    "friend": ("Who is its best friend?", "And who is its best friend?", "And its best friend?"),
    "sound": ("What does it say?", "And which sound does it make?", "And its sound?"),
    "treasure": ("What is its treasure?", "And what does it keep?", "And its treasure?"),
    "awake": ("When does it wake up?", "And when does it get up?", "And its waking time?"),
}

SMALL_TALK = (
    (
        ("Hello!", "Hi!", "Hello.", "Hi", "Hey there!", "Good day!"),
        "Hello! I am Minnow. Ask me about the creatures of the pond.",
    ),
    (("Good morning!", "Good morning."), "Good morning! Ask me about the creatures of the pond."),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me who you are.",
            "Please introduce yourself.",
        ),
        "I am Minnow, a small language model. I know the creatures of the pond.",
    ),
    (
        ("What can you do?", "What do you know?", "How can you help me?", "What can I ask you?"),
        "I know where the creatures of the pond live, what they eat and who their friends are.",
    ),
    (("How are you?", "How do you feel today?"), "I am well, thank you. The pond is calm today."),
    (("Thank you!", "Thanks!", "Thank you very much."), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you later!", "Good night!"), "Goodbye! Come back to the pond soon."),
    (
        ("Do you speak Chinese?", "Can you speak Chinese?", "Which languages do you speak?"),
        "I speak English and Chinese.",
    ),
)

ENGLISH = Phrasebook(
    language="en",
    space=" ",
    statements=STATEMENTS,
    pronouns=PRONOUNS,
    contrasts=CONTRASTS,
    groups=GROUPS,
    openings=OPENINGS,
    scenes=SCENES,
    endings=ENDINGS,
    translations=TRANSLATIONS,
    question_cores=QUESTION_CORES,
    question_leads=QUESTION_LEADS,
    follow_ups=FOLLOW_UPS,
    switches=("And {x}?", "What about {x}?", "And what about {x}?"),
    summaries=(
        "Tell me about {x}.",
        "What do you know about {x}?",
        "Who is {x}?",
        "Please tell me about {x}.",
    ),
    small_talk=SMALL_TALK,
    ignorance="I do not know it.",
    system_prompts=(
        "You are Minnow, a small and friendly model.",
        "You are a helpful assistant.",
        "Answer in one short sentence.",
    ),
    dialogue=(("Question: ", "Answer: "), ("Visitor: ", "Minnow: "), ("Q: ", "A: ")),
)
