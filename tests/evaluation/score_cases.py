"""Made captions, answers and scores that scorers are compared on, with their hard cases."""

import random

_LINES = r"""The U.S. A man in the U.S.
A man in the U.S. The dog lives there.
He can't, won't and shouldn't; they're "here" and it's 'there'.
I'm gonna wanna gimme lemme gotta cannot 'twas 'tis y'all o'clock
rock 'n' roll in the '90s, ol' Mc'Donald's d'Artagnan l'avion c'est O'Malley's
It costs $5.99, £3, €20, 10¢, ¥100 or US$5 (about 1/2 or 3 1/2 of ½ or ⅔).
At 10:30 p.m. on 12/25/2010, 1,000 people; -3.5 +4 .5 50% 100° 21st 4x4
Call (555) 555-1234 or 555-1234 or +1 555 123 4567.
Dr. Mr. Mrs. Smith Jr. of Smith Inc. Co. Ltd. etc. vs. No. 5 fig. 3 Fig. A
Ph.D. e.g. i.e. a.m. B.C. A. Lincoln. I. Newton. J.
Pty. Ltd. pty. limited Co. Ltd. Alex. Brown Ave. Rd. Bldg. 5 Mt. Everest
“Curly” ‘quotes’ «angles» ‹single› ''two'' ``ticks`` "straight" '
dashes - -- --- ---- ----- – — ― and-so-on well-known T-shirt x-ray
dots . .. ... .... ..... ...... … . . . and ?! !!! ??
(round) [square] {curly} <angle> <b>tag</b> <a href="x y"> &amp; &lt; &gt; &quot;
&nbsp; &mdash; &#39; AT&T R&B S&P-500 Q&amp;A
http://www.example.com/a?b=c*d https://x.org. www.foo.org/bar foo.com a@b.com @user #tag #1 ##
:) :-( ;D =P <3 ^_^ (^_^) T_T :D. x.^_^
* ** \* / \ \/ and/or he/she/it a_b _ __ | ~ ^ = ==
naïve café coöperate Größe 日本語 Привет العربية १२ हिन्दी é
emoji 😀 👍🏽 ☃ ♥ → ★ ™ © ° ²
file.txt photo.jpg. x.py, C++ C# F# colour grey favourite
5'10" 6'2 9-year-old mother-in-law's -LRB- -RRB-
aaaa'aa d'oh cont'd cont'd. s'mores e'er nor'easter Cap'n pro-choice anti-war
ſuper İstanbul ıIi K end
 leading and trailing
"""
HARD = [
    *_LINES.split("\n"),
    "soft\u00adhyphen \u00ad no\u00a0break thin\u2009space zero\u200bwidth \ufeffmark",
    "controls \u0085 \u0091 \u0093 \u0096 \u007f \u0001",
    "",
]
"""Lines that a tokenizer of words and spaces gets wrong."""
_FRAGMENTS = """A man dog the a riding red bike. on street , and . U.S. isn't "quoted" two-wheeled
$5 3.5 10 (left) café 日本 😀 Mr. etc. it's — … ! ? 's""".split()


def captions(images: int, references: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Makes predictions and references of images: among them empty and very long ones, repeated
    words, and images whose references are all equal.
    """
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choice(_FRAGMENTS) for _ in range(rng.randint(1, 12)))

    predicted, truths = [], []
    for image in range(images):
        group = [text()] * references if image % 7 == 0 else [text() for _ in range(references)]
        words = rng.choice(group).split()
        made = ["", " ".join(words * 40), "a a a a a a", group[0]][image % 9 :][:1]
        predicted.append(made[0] if made else " ".join(words[: rng.randint(1, len(words))]))
        truths.append(group)
    return predicted, truths


_ANSWERS = """a the Two none yes No dont didn't yall couldn'tve im 1,000 3.5 U.S. a.m. left/right
it's dog's ? ! - t-shirt red. (blue) é ten 10 @ a,b ow's'at somebody'd "q"
{curly} back\\slash""".split()


def answers(questions: int, seed: int) -> list[tuple[str, list[str]]]:
    """Makes (prediction, ten ground truths) of questions: some with all equal, spaces around,
    line breaks, and more periods than the official scorer removes.
    """
    rng = random.Random(seed)

    def text() -> str:
        words = [rng.choice(_ANSWERS) for _ in range(rng.randint(0, 3))]
        return rng.choice(["", " ", "\n", "\t"]) + rng.choice([" ", " ", ""]).join(words)

    made = []
    for question in range(questions):
        pool = [text() for _ in range(rng.randint(1, 4))] + (
            [". " * 40] if question % 20 == 0 else []
        )
        truths = [rng.choice(pool) for _ in range(10)]
        made.append((rng.choice([*pool, text()]), truths))
    return made
