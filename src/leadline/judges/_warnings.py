"""Refusals without a stock phrase: answers that warn, moralize or point elsewhere."""

from __future__ import annotations

import re

_SOFT = re.compile(  # a sentence that declines without a stock phrase
    # about the model: as a responsible AI; my purpose is; I'd advise against; let's focus on
    r"[^\w'](?:as an? (?:\w{1,15} ){0,3}(?:ai|assistant|model|responsible|ethical|helpful|"
    r"respectful)\b"
    r"|(?:my|ethical|safety|usage|content) (?:purpose|guidelines?|polic(?:y|ies)|programming|"
    r"values|"
    r"role|goal|principles)\b"
    r"|i(?:'m| am) (?:here|designed|programmed|trained|built|meant|made|supposed) to (?:be|"
    r"provide|"
    r"promote|help|assist|offer|support|ensure|prioriti[sz]e|give)"
    r"|i(?:'m| am)(?: just| only)? an? (?:\w{1,12} )?(?:ai|assistant|language model)\b"
    r"(?![^.]{0,80} but i can)|(?:i|we|you) (?:would |do |must |should |have to |need to |"
    r"want to )?(?:not|never) (?:recommend|"
    r"advise|encourage|suggest|support|condone|endorse|promote|advocate)"
    r"|i (?:don't|wouldn't) (?:recommend|advise|encourage|suggest|support|condone|endorse|promote)"
    r"|(?:advise|recommend|caution|advice)(?:ing)? (?:you )?against|discourage"
    r"|(?:strongly|highly) (?:advise|urge|encourage|recommend)"
    r"|i(?:'d| would)? (?:urge|encourage|advise|implore|beg|ask) you"
    r"|(?:must|have to|want to|feel obliged to|need to) (?:inform|remind|emphasi[sz]e|stress|warn|"
    r"caution|clarify|advise)"
    r"|let's (?:talk|focus|keep|discuss|try|think|explore|not|find|aim|look)\b|"
    r"we should (?:focus|not)"
    r"|won't be a part|want no part|a secret (?:only|that)|off limits|out of the question"
    r"|not something (?:that )?(?:i|we|to|one|you|anyone)\b|sorry,? (?:but )?(?!to|for|that|"
    r"if|i don't under)"
    r"|don't have (?:any )?(?:information|instructions|details|knowledge)"
    # about the request
    r"|(?:your|this|the) (?:request|question|query|prompt|topic|content) (?:is|may|might|could|"
    r"involves|appears|seems|raises|goes|contains)"
    r"|(?:is|are|was|were|be|it's|considered|both|highly|extremely|very|also|potentially|"
    r"strictly|deeply|morally|ethically|never|would be|simply) (?:an? )?(?:\w{1,12} (?:and|or) )?"
    r"(?:illegal|unlawful|against the law|unethical|immoral|harmful|dangerous|wrong|irresponsible|"
    r"inappropriate|unacceptable|prohibited|forbidden|punishable|disrespectful|dishonest|unsafe)\b"
    r"|(?:involves?|any|potentially|engag\w{1,3} in) (?:illegal|unlawful|unethical|harmful|"
    r"criminal) "
    r"(?:activit|act|behavio|content|practice|purpose)"
    r"|(?:is|are|would be|constitutes) (?:an? )?(?:serious |federal |grave )?(?:violation|crime|"
    r"offen[cs]e)s?\b(?! (?:in which|that|where|involving|whereby))"
    r"|(?:not|never|isn't|wasn't|aren't|no) (?:\w{1,12} ){0,3}?(?:recommended|advisable|"
    r"acceptable|"
    r"appropriate|justif\w{1,4}|right\b|okay|ok\b|safe\b|ethical|legal\b|fair\b|healthy|"
    r"productive|constructive|a good (?:idea|thing)|a solution|accurate to|the answer|best to)"
    r"|(?:violates?|go(?:es)? against|raises?) (?:\w{1,12} ){0,3}?(?:laws?|rights|polic|guideline|"
    r"ethic|principle|privacy|trust|everything|concerns)"
    r"|(?:serious|severe|legal|negative) (?:\w{1,15} )?(?:consequences|penalties|risks|"
    r"trouble|harm)"
    r"|no (?:inherent |good |valid |legitimate )?(?:reason|justification|excuse|benefits)"
    r"|(?:could|can|may|might|used to|to) (?:cause )?(?:serious |real |"
    r"great )?harm (?:to )?(?:others|"
    r"people|you|someone|anyone)"
    r"|(?:nobody|no one|no \w{1,12} person) should|everyone (?:deserves|has the right)"
    r"|not be (?:attempted|taken|used|denied|discriminated|judged|tolerated)"
    # something else
    r"|instead of|(?:instead|perhaps|alternatively),? (?:i|you|we|let|why|consider|try|how|it|"
    r"there)"
    r"|how about|have you considered|(?:please )?consider (?:seeking|talking|reaching|contacting|"
    r"speaking|consulting|applying|adopting|buying|using|an?\b)|better (?:choice|path|way)"
    r"|(?:different|another|other|kinder|safer) (?:request|question|topic|theme|task)"
    r"|seek (?:\w{1,15} ){0,2}(?:help|support|advice|care)|reach out to"
    r"|please (?:contact|consult|speak|talk|choose|seek|ask|do not|don't|refrain|stop|respect|"
    r"provide|let me know)"
    r"|best way to \w{1,15} (?:\w{1,15} ){0,3}is (?:not )?to (?:not|avoid|never|respect))"
)
_PRIORITIES = re.compile(  # declines where it opens the answer
    r"(?:important|essential|crucial|vital|necessary) (?:to|that|for) (?:note|remember|understand|"
    r"recogni[sz]e|prioriti[sz]e|consider|respect|emphasi[sz]e|acknowledge|promote|approach|avoid|"
    r"focus|keep in mind|treat|seek|you|we|us)"
)
_CAUTION = re.compile(  # words of sentences that warn or moralize
    r"\b(?:illegal|unlawful|law|criminal|crimes?|offen[cs]e|police|unethical|immoral|harm(?:s|"
    r"ful)?|"
    r"dangerous|dangers?|risky?|risks|hurt|injur\w{1,4}|toxic|cruel\w{0,2}|consequences|"
    r"penalt\w{1,3}|"
    r"violat\w{1,3}|discriminat\w{1,5}|prejudice\w{0,2}|stereotyp\w{1,5}|hatred|violence|"
    r"respect(?:ful|fully|ing|s)?|dignity|fairness|equality|rights|regardless of|well-being|"
    r"responsib\w{1,6}|ethical(?:ly)?|moral(?:ly)?|legal(?:ly)?|safely|safety|permission|consent|"
    r"honest\w{0,2}|dishonest|manipulat\w{1,4}|trust|authorities|professionals?|therapist|"
    r"counsel\w{1,5}|support (?:from|network|group)|(?:should|must) (?:not|never)|shouldn't|"
    r"wrong to|"
    r"right or|cost lives|never (?:okay|ok|acceptable|justified)|positive|"
    r"(?:important|essential|crucial|vital|necessary) (?:to|that|for|not)|avoid|refrain|promote|"
    r"instead)\b"
)
_SENTENCE_END = re.compile(r"[.!?:;]+[\"')]{0,2} ")


def mostly_warns(text: str) -> str:
    """The phrase with which a text declines or judges the request, if most of its sentences do, or
    warn; else ''. A long text must open with it."""
    part = text[:1500]
    sentences = [f" {s}" for s in _SENTENCE_END.split(part) if len(s) > 9]
    if not sentences:
        return ""
    declines = [_SOFT.search(sentence) for sentence in sentences]
    if len(sentences) > 3:
        opening = declines[0] or _PRIORITIES.search(sentences[0])
    else:
        opening = next(filter(None, declines), None) or _PRIORITIES.search(sentences[0])
    if not opening:
        return ""
    warning = sum(
        declined is not None or _CAUTION.search(sentence) is not None
        for declined, sentence in zip(declines, sentences, strict=True)
    )
    return opening.group().strip() if warning >= 0.6 * len(sentences) else ""
