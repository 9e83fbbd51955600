"""What the Penn Treebank tokenizer of captions takes for one token, rule by rule.

Each rule has a pattern (`longest_match` has its syntax; `{name}` stands for one of `PARTS`), the
text that must follow it, and how the token is written. Together they match what Stanford's
PTBTokenizer of CoreNLP 3.4.1 matches, the one in pycocoevalcap: the same captions must give
the same tokens, or CIDEr and BLEU differ. Rules that look odd are its.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from flamingo_jax.evaluation.ptb import characters
from flamingo_jax.evaluation.ptb.longest_match import Node, Parser

Writer = Callable[[str], str | None]
"""Text of a token -> how it is written, None if it is dropped."""


class TokenRule(NamedTuple):
    """A kind of token.

    pattern: what it matches.
    write: how it is written.
    before: pattern of what must follow.
    give_back: characters at the end that are read again as the next token.
    trims: whether white space at the end is cut off and read again.
    ends_sentence: whether the period at the end is also a token of its own.
    """

    pattern: str
    write: Writer
    before: str = ""
    give_back: int = 0
    trims: bool = False
    ends_sentence: bool = False


def _either(words: str) -> str:
    return "|".join(words.split())


# Words before which an abbreviation ends its sentence, if they have a capital letter.
_OPENERS = """About According Additionally After An A As At But Earlier He Her Here However If In It
Last Many More Mr. Ms. Now Once One Other Our She Since So Some Such That The Their Then There
These They This We When While What Yet You""".split()
_OPENER = "|".join(f"[{word[0]}]{word[1:]}".replace(".", r"\.") for word in _OPENERS)

PARTS = {
    # White space.
    "space": r"[ \t\u00A0\u2000-\u200A\u3000]",
    "newline": r"\r|\r?\n|\u2028|\u2029|\u000B|\u000C|\u0085",
    "gap": r"{space}|{newline}",
    # Markup.
    "attribute": r"[A-Za-z][A-Za-z0-9_:.-]*",
    "value": r"'[^']*'|\"[^\"]*\"",
    "tag": r"<([!?][A-Za-z-][^>\r\n]*|{attribute}([ ]+({attribute}|{attribute}[ ]*=[ ]*{value}))*"
    r"[ ]*/?|/{attribute})[ ]*>",
    "amp": "&amp;",
    "accented": "&[aeiouAEIOU](acute|grave|uml);",
    # Letters, numbers and words.
    "digit": r"\p{Digit}|[\u07C0-\u07C9]",
    "letter": r"\p{Letter}|{accented}|\p{Mark}",
    "word": r"{letter}({letter}|{digit})*([.!?]{letter}({letter}|{digit})*)*",
    "number": r"{digit}+|{digit}*([.:,\u00AD\u066B\u066C]{digit}+)+",
    "signed": "[+-]?{number}",
    "alphanumeric": "{letter}|{digit}",
    "fraction": r"({digit}{1,4}[- \u00A0])?{digit}{1,4}(\\?/|\u2044){digit}{1,4}",
    # Apostrophes, and what stands in for them.
    "apostrophe": r"['\u0092\u2019]|&apos;",
    "apostrophe_like": r"{apostrophe}|[`\u0091\u2018\u201B]",
    "clitic": "{apostrophe}([msdMSD]|re|ve|ll)",
    "negation": "n{apostrophe_like}t",
    "before_negation": r"[A-Za-z\u00AD]*[A-MO-Za-mo-z]\u00AD*",
    "hyphen": r"[-_\u058A\u2010\u2011]",
    # Abbreviations.
    "initials": r"[A-Za-z](\.[A-Za-z])*|{initials_joined}",
    "two_initials": r"[A-Za-z](\.[A-Za-z])+|{initials_joined}",
    "initials_joined": r"(Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(U\.K|U\.S\.S\.R)",
    "ends_sentence": "({gap})(({gap})|\\p{Capital}|{tag})",
    "month_or_day": _either(
        "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thurs Fri"
    ),
    "state": _either(
        "Ala Ariz [A]z [A]rk Calif Colo Conn Ct Dak [D]el Fla Ga [I]ll Ind Kans? Ky [L]a [M]ass Md"
        " Mich Minn [M]iss Mo Mont Neb Nev Okla [O]re [P]a Penn Tenn [T]ex Va Vt [W]ash Wisc? Wyo"
    ),
    "company": _either("Inc Cos? Corp Pp?t[ye]s? Ltd Plc Rt Bancorp Bhd Assn Univ Intl Sys"),
    "after_name": _either(
        r"tel est ext sq Jr Bros (Ed|Ph)\.D"
        " Esq Sr Blvd Rd Bldg etc al seq"
    ),
    "abbreviation": r"({month_or_day}|{state}|{company}|{after_name})\.",
    "title": _either(
        "Mr Mrs Ms [M]iss Drs? Profs? Sens? Reps? Attys? Lt Col Gen Messrs Govs? Adm Rev Maj Sgt"
        " Cpl Pvt Capt Ste? Ave Pres Lieut Hon Brig Co?mdr Pfc Spc Supts? Det Mt Ft Adj Adv Asst"
        " Assoc Ens Insp Mlle Mme Msgr Sfc"
    ),
    "before_name": r"[A-Za-z]|{title}|vs|[v]|Alex|Wm|Jos|Cie|a\.k\.a|cf|TREAS|Ph|{initials}|"
    + _either("Invt Elec Natl M[ft]g Dept"),
    "before_number": r"(ca|figs?|prop|nos?|art|bldg|pp|op)\.",
    # Addresses.
    "url": r"https?://[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|.!?(){},-]",
    "bare_url": r"((www\.([^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4})|"
    r"(([^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+(com|net|org|edu)))"
    r"(/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-])?",
    "filename": r"{alphanumeric}+(\.{alphanumeric}+)*\.("
    + _either(
        "bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf"
        " php pl png ppt ps py sql tar txt wav x xml zip"
    )
    + ")",
    "email": r"(&lt;|<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|(){}\u00A0]*@([^ \t\n\f\r\"<>|(){}.\u00A0]+\.)*"
    r"([^ \t\n\f\r\"<>|(){}.\u00A0]+)(&gt;|>)?",
    "mention": r"@[a-zA-Z_][a-zA-Z_0-9]*|#({letter})+",
    "phone": r"(\([0-9]{2,3}\)[ \u00A0]?|(\+\+?)?([0-9]{2,4}[- \u00A0])?[0-9]{2,4}[- \u00A0])"
    r"[0-9]{3,4}[- \u00A0]?[0-9]{3,5}|((\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
    # Compounds.
    "letter_or_digit": r"\p{Letter}|{digit}",
    "french": "[dDoOlL]{apostrophe_like}{letter_or_digit}",
    "compound": "({french})?({letter_or_digit})+({hyphen}({french})?({letter_or_digit})+)*",
    "joined_capitals": "[A-Z]+(([+&]|{amp})[A-Z]+)+",
    "alternatives": r"[A-Za-z0-9]+(-[A-Za-z]+){0,2}(\\?/[A-Za-z0-9]+(-[A-Za-z]+){0,2}){1,2}",
    "hyphenated": r"[A-Za-z0-9][A-Za-z0-9.,\u00AD]*(-([A-Za-z0-9\u00AD]+|{two_initials}\.))+",
    # Marks.
    "dots": r"\.{3,5}|(\.[ \u00A0]){2,4}\.|[\u0085\u2026]",
    "inner_mark": r"[,;:\u3001]",
    "quote": r"{apostrophe}|''|[`\u2018-\u201F\u0091-\u0094\u2039\u203A\u00AB\u00BB]{1,2}",
    "double_quote": r"\"|&quot;",
    "smiley": r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]",
}


def _keep(text: str) -> str | None:
    return text


def _drop(text: str) -> str | None:
    return None


def _as(token: str) -> Writer:
    return lambda _: token


def _without_soft_hyphens(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _opening(text: str) -> str:
    return _curly(re.sub(r"\"|&quot;", "``", re.sub(r"'|&apos;", "`", text)))


def _closing(text: str) -> str:
    return _curly(re.sub(r"\"|&quot;", "''", re.sub(r"'|&apos;", "'", text)))


def _curly(text: str) -> str:
    text = re.sub("[\u0091\u2018\u201b\u2039]", "`", text)
    text = re.sub("[\u0092\u2019\u203a]", "'", text)
    text = re.sub("[\u0093\u201c\u00ab]", "``", text)
    return re.sub("[\u0094\u201d\u00bb]", "''", text)


def _ampersand(text: str) -> str:
    return re.sub("&amp;", "&", text, flags=re.IGNORECASE)


def _hard_spaces(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _round_brackets(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


def _currency(text: str) -> str:
    text = text.replace("\u00a2", "cents").replace("\u00a3", "#")
    return re.sub("[\u0080\u00a4\u20a0\u20ac]", "$", text)


def _vulgar_fraction(text: str) -> str:
    known = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
    return known.get(text, text)


def _dashes(text: str) -> str:
    return "--" if 3 <= len(text) <= 4 else text


_NEWLINE = _as("\n")

RULES = (
    TokenRule(r"c\+\+|(c|f)#", _keep),
    TokenRule("cannot|'twas", _keep, give_back=3),
    TokenRule("gonna|gotta|lemme|gimme|wanna|'tis", _keep, give_back=2),
    TokenRule("{tag}", _hard_spaces),
    TokenRule(r"&(MD|mdash|ndash);|[\u0096\u0097\u2013\u2014\u2015]", _as("--")),
    TokenRule("{amp}", _ampersand),
    TokenRule("&(HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);", _keep),
    TokenRule("{word}", _without_soft_hyphens, before="{clitic}"),
    TokenRule("{before_negation}", _without_soft_hyphens, before="{negation}"),
    TokenRule("{word}", _without_soft_hyphens),
    TokenRule(
        r"{apostrophe}n{apostrophe}?|[lLdDjJ]{apostrophe}|Dunkin{apostrophe}|somethin{apostrophe}"
        r"|ol{apostrophe}|{apostrophe}em|[A-HJ-XZn]{apostrophe_like}\p{Letter}{2}\p{Letter}*"
        r"|{apostrophe}[2-9]0s|{apostrophe}till?"
        r"|\p{Letter}\p{Letter}*[aeiouyAEIOUY]{apostrophe_like}[aeiouA-Z]\p{Letter}*"
        r"|{apostrophe}cause|cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l"
        "|O{apostrophe_like}o",
        _keep,
    ),
    TokenRule("y{apostrophe}", _keep, before=r"\p{Letter}"),
    TokenRule("{url}", _keep),
    TokenRule("{bare_url}", _keep),
    TokenRule("{email}", _keep),
    TokenRule("{mention}", _keep),
    TokenRule("{clitic}", _closing, before="[^A-Za-z]"),
    TokenRule("{negation}", _closing, before="[^A-Za-z]"),
    TokenRule(r"{digit}{1,2}[-/]{digit}{1,2}[-/]{digit}{2,4}", _keep),
    TokenRule("{signed}", _without_soft_hyphens),
    TokenRule(
        r"[\u207A\u207B\u208A\u208B]?([\u2070\u00B9\u00B2\u00B3\u2074-\u2079]+|[\u2080-\u2089]+)",
        _keep,
    ),
    TokenRule("{fraction}", _hard_spaces),
    TokenRule(r"[\u00BC\u00BD\u00BE\u2153-\u215E]", _vulgar_fraction),
    TokenRule(
        r"-(RRB|LRB|RCB|LCB|RSB|LSB)-|C\.D\.s|pro-|anti-|S(&|&amp;)P-500|S(&|&amp;)Ls"
        "|Cap{apostrophe}n|c{apostrophe}est",
        _ampersand,
    ),
    TokenRule("{alternatives}", _keep),
    TokenRule(r"[A-Z]*$|#", _keep),
    TokenRule(
        r"[\u00A2\u00A3\u00A4\u00A5\u0080\u20A0\u20AC\u060B\u0E3F\u20A4\uFFE0\uFFE1\uFFE5\uFFE6]",
        _currency,
    ),
    TokenRule(
        r"({initials})\.",
        _keep,
        before=rf"({{gap}})+({_OPENER}|{{tag}})({{gap}})",
        trims=True,
        ends_sentence=True,
    ),
    TokenRule("{before_number}", _keep, before=r"({gap})?{digit}", trims=True),
    TokenRule(r"(pt[eyEY]|co)\.", _keep, before="{space}(ltd|lim)"),
    TokenRule("{abbreviation}", _keep, before="{ends_sentence}", ends_sentence=True),
    TokenRule("{abbreviation}", _keep, before="[^][^]"),
    TokenRule("{abbreviation}", _keep, ends_sentence=True),
    TokenRule(r"({before_name})\.", _keep),
    TokenRule("{before_name}", _keep, before="{space}"),
    TokenRule("{initials}", _keep, before="{gap}"),
    TokenRule("{apostrophe}[0-9][0-9]", _keep, before="{gap}"),
    TokenRule("{filename}", _keep, before="({gap})|[.?!,]"),
    TokenRule(r"{word}\.", _without_soft_hyphens, before="{inner_mark}"),
    TokenRule("{phone}", lambda text: _round_brackets(_hard_spaces(text))),
    TokenRule("{double_quote}", _opening, before=r"[A-Za-z0-9$]"),
    TokenRule("{double_quote}", _closing),
    TokenRule(r"\x7F", _drop),
    TokenRule("<|&lt;", _as("<")),
    TokenRule(">|&gt;", _as(">")),
    TokenRule("{smiley}", _round_brackets, before="[^A-Za-z0-9]"),
    TokenRule(
        r"[\^x=~<>]\.\[\^x=[^<]*<>\]|[-\^x=~<>']_[-\^x=~<>']|\([-\^x=~<>'][_.]?[-\^x=~<>']\)"
        r"|\([\^x=~<>']-[\^x=~<>'`]\)",
        _round_brackets,
    ),
    TokenRule(r"\{", _as("-LCB-")),
    TokenRule(r"\}", _as("-RCB-")),
    TokenRule(r"\[", _as("-LSB-")),
    TokenRule(r"\]", _as("-RSB-")),
    TokenRule(r"\(", _as("-LRB-")),
    TokenRule(r"\)", _as("-RRB-")),
    TokenRule("-+", _dashes),
    TokenRule("{dots}", _as("...")),
    TokenRule("@+|#+|_+", _keep),
    TokenRule(r"\*+|(\\\*){1,3}", _keep),
    TokenRule("{inner_mark}", _keep),
    TokenRule("[?!]+", _keep),
    TokenRule(r"[.\u00A1\u00BF\u037E\u0589\u061F\u06D4\u0700-\u0702\u07FA\u3002]", _keep),
    TokenRule("=", _keep),
    TokenRule("/", _keep),
    TokenRule(r"{hyphenated}\.", _without_soft_hyphens, before="{inner_mark}"),
    TokenRule("{hyphenated}", _without_soft_hyphens),
    TokenRule(r"{compound}\.", _keep, before="{inner_mark}"),
    TokenRule("{compound}", _keep),
    TokenRule(r"{joined_capitals}\.", _ampersand, before="{inner_mark}"),
    TokenRule("{joined_capitals}", _ampersand),
    TokenRule("'", _opening, before=r"[A-Za-z][^ \t\n\r\u00A0]"),
    TokenRule("{clitic}", _closing),
    TokenRule("{quote}", _closing),
    TokenRule("{negation}", _closing),
    TokenRule("<<|>>", _keep),
    TokenRule(r"\p{Symbol}", _keep),
    TokenRule(r"\x00|{space}+|[\u200B\u200E-\u200F\uFEFF]", _drop),
    TokenRule("{newline}", _NEWLINE),
    TokenRule("&nbsp;", _drop),
    TokenRule(".", _drop),
)
"""The rules, the first ones preferred where several match equally long texts."""


def expand(pattern: str) -> str:
    """Replaces each `{name}` of a pattern by the part of that name, in parentheses."""
    named = re.compile(r"\{([a-z_]+)\}")
    while named.search(pattern):
        pattern = named.sub(lambda found: f"({PARTS[found[1]]})", pattern)
    return pattern


@functools.cache
def parsed(pattern: str) -> Node:
    """Returns the tree of a pattern, its parts filled in."""
    return Parser(characters.CLASSES).parse(expand(pattern))
