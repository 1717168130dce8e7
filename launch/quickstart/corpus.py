"""Short texts on everyday matters, written from a grammar: what the base model reads before it is tuned.

General prose: no support message, no category, no chat. A paragraph keeps to one matter, one person and one thing, so a model
that is to guess the next sentence has to notice what the text is about and which thing it names. `[a|b]` draws one wording.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from tritune.launch.quickstart.grammar import ITEMS, NAMES, fill

MATTERS: dict[str, list[str]] = {
    "money given back": [
        'The word "[refund|payment|credit]" stood at the top of the page.',
        '"[refund|payment|credit]" was the word that {name} looked up.',
        "{name} [took|brought|carried] the {item} back to the shop and asked for [the money|a refund|the price] back.",
        "A refund is money that a shop [gives|pays|sends] back.",
        "The [clerk|seller|shop] [paid|gave|handed] {name} the [money|price|sum|full price] of the {item} back.",
        '"I want my money back for the {item}," said {name}.',
        "The [bank|card] showed that the [refund|money|payment|sum] for the {item} had been [credited|returned|repaid].",
        "Who is overcharged has paid too much and should be [refunded|reimbursed|repaid|paid back].",
        "{name} had been charged twice for the {item}, so the [second|extra] payment was [returned|refunded|reimbursed].",
        "To reimburse somebody is to [repay|pay back|give back] what was [spent|paid].",
        "The difference in price was [transferred|paid|credited] to the [bank|card] of {name}.",
        '"When do I get [the refund|my payment|the money] for the {item}?" {name} asked the [bank|shop].',
        "After the return of the {item}, {name} waited a [week|month] until the [money|refund] reached the bank.",
        "The {item} was [unused|unopened|too dear], so {name} could return it and keep the money.",
        "What {name} had [spent on|paid for|overpaid for] the {item} came back to the card.",
        '"You [took|charged] too much," said {name}, "please repay me."',
        '"I brought the {item} back, and [nobody|the shop] has [repaid|paid back|refunded] anything [yet|so far]," said {name}.',
        '"My [card|bank] shows [no refund|that I paid too much|two payments], and I [asked|wrote] for [it|my money] back."',
        '"Will they [give|pay] me back what I [paid|spent]?" asked {name}. "The {item} is of no use to me."',
        '"The shop promised to [repay|reimburse|refund] me for the {item} that I returned."',
    ],
    "parcels": [
        'The word "[delivery|parcel|courier]" stood at the top of the page.',
        '"[delivery|parcel|courier]" was the word that {name} looked up.',
        "A parcel is [brought|delivered|carried] to the door by a [courier|driver].",
        "The [courier|driver] [came|drove up|rang] on {day} with a [parcel|package|box] for {name}.",
        "The {item} had been [shipped|sent] on {day} and was still [on its way|in the depot|at the warehouse|not here].",
        "{name} [waited|had been waiting|stayed at home] all [day|week] for the [parcel|package|delivery|shipment].",
        '"Where is my {item}? It has not [arrived|come|reached me]," said {name}.',
        "The tracking page said that the [parcel|package|shipment|{item}] was [late|on its way|in a van|delivered].",
        "A tracking number shows where a [parcel|package|shipment] is.",
        "The van of the [courier|driver] was [late|stuck] and nobody [brought|delivered] the {item}.",
        "The [package|parcel] with the {item} [got lost|was lost|did not turn up|was left with a neighbour].",
        "On {day} the {item} [arrived|was at the door|was brought|was delivered] at last.",
        "{name} expected the {item} on {day}, but no [driver|courier|van] turned up.",
        "Shipping takes some days, and a [parcel|package|delivery] can be late.",
        "From the [warehouse|depot] the {item} is driven to the house of {name}.",
        '"[No driver|No courier|Nobody] has [come|rung] [so far|yet]," said {name}. "I have [waited|sat here] since {day}."',
        '"Was it [sent|shipped|posted] at all? By {day} I should have had the {item}."',
        '"How many days does [it|a parcel|the delivery] take to [come|reach me|get here]?" {name} wondered.',
        '"I still have no [parcel|package|trace of the {item}], it is [stuck|lost|late]."',
    ],
    "passwords": [
        'The word "[account|password|login]" stood at the top of the page.',
        '"[account|password|login]" was the word that {name} looked up.',
        "A password is a secret word with which a user [logs in|signs in].",
        "{name} [forgot|did not remember|had lost] the password and could not [log in|sign in|get in].",
        "Who types a wrong [password|code] too often is locked out of [an account|a profile|a website|the app].",
        '"I cannot [log in|sign in], my [account|profile|login] is [locked|blocked]," said {name}.',
        "The [website|app|page|site] asked {name} for a user name and a [password|code].",
        "The [app|website|page] [rejected|did not accept|refused] the [login|password|code|user name].",
        "To reset a password, {name} [tapped|clicked] on a link and chose a new one.",
        "A stranger who knows the password can [log in|sign in] to the [account|profile].",
        "{name} was asked to register and create an account.",
        "On the phone came a code for [the login|signing in].",
        "The [login|account|password] of {name} did not work any more on the [site|website|page].",
        "After a new [password|code], {name} was logged in again and saw the {item} on the page.",
        '"Unlock my [account|profile], I am [logged out|locked out]," {name} said.',
        '"I cannot remember my [password|user name|code], so I cannot [get in|sign in|log in]," {name} [told a friend|said].',
        '"The [app|website|page] has [logged me out|locked me out], and [signing in|logging in|the login] [failed|fails] again."',
        '"Somebody knows my password and has been in my [account|profile]!" said {name}.',
        '"How do I [register|become a user|make an account]?" asked {name}, who sat before the [website|page|app].',
    ],
    "joy": [
        'The word "[praise|joy|pleasure]" stood at the top of the page.',
        '"[praise|joy|pleasure]" was the word that {name} looked up.',
        "{name} was [happy|delighted|pleased|thrilled|glad] with the {item}.",
        "The {item} is [wonderful|lovely|beautiful|superb|great|excellent|fantastic|perfect].",
        '"What a [wonderful|lovely|beautiful|fantastic|great] {item}!" said {name}.',
        "All the [friends|family|children] of {name} [admired|loved|adored|enjoyed|praised] the {item}.",
        '"I [love|adore|enjoy] the {item}, it is [superb|perfect|the best|excellent]," said {name}.',
        "To praise is to say that something is [good|great|well done|excellent].",
        "The [staff|team|people] had been so [kind|friendly|helpful] that {name} [smiled|thanked them].",
        "{name} was [impressed|delighted] to see the {item} so [well|beautifully] made.",
        "It was a [pleasure|joy] to see the {item}, and {name} would recommend it to all friends.",
        "A [lovely|wonderful|superb] present makes [children|friends|people] [happy|smile].",
        "{name} sent compliments to the makers of the {item}, and gave it five stars.",
        "Everyone was [thrilled|delighted|happy] and {name} said thank you.",
        '"I am so [happy|pleased|glad|thrilled] with my {item}," {name} [told a friend|said].',
        '"My [children|friends|wife|daughter] [love|adore|enjoy|admire] the {item}, thank you [so much|all]!"',
        '"I have [had|seen|owned] no [better|finer|lovelier] {item}," said {name}.',
        '"You were so [kind|helpful|friendly|quick], and it is [very well|beautifully] made."',
    ],
    "called off": [
        'The word "[cancel|withdraw|undo]" stood at the top of the page.',
        '"[cancel|withdraw|undo]" was the word that {name} looked up.',
        "To cancel is to [call off|stop|undo|withdraw] what was ordered or planned.",
        "{name} [cancelled|called off|withdrew|stopped] the order of the {item} before it was [packed|sent|shipped].",
        '"[Stop|Cancel|Undo] the order, I do not want the {item} [any more|any longer]," said {name}.',
        "The {item} had been ordered by [mistake|accident], so the order was [cancelled|stopped|withdrawn|undone].",
        "{name} had [pressed|clicked] the wrong button and ordered the {item} by [accident|mistake].",
        "The plans of {name} had changed, and the [trip|party|order] was [cancelled|called off].",
        "{name} decided against the {item} and [withdrew|cancelled|called off] the order.",
        "An order can be [cancelled|stopped|undone|withdrawn] as long as it is not [packed|shipped|sent].",
        '"Do not [send|pack|ship] the {item}, it was a mistake," said {name}.',
        "{name} ended the [subscription|order|plan] at the end of the month.",
        "Two of the {item} were too many, so {name} cancelled the second.",
        "It was not too late to [cancel|withdraw|call off|stop it].",
        '"I have [changed my mind|other plans|decided against it], so [stop it|call it off|do not send it]," said {name}.',
        '"Can I still [withdraw|cancel it|undo it|call it off]?" asked {name}. "I do not [need|want] the {item}."',
        '"I never [meant|wanted] to order the {item}, I [pressed|clicked] the wrong button."',
        '"[Please do not|Do not] [pack|ship|send] it, one is enough," {name} told the seller.',
    ],
    "bills": [
        'The word "[invoice|receipt|tax]" stood at the top of the page.',
        '"[invoice|receipt|tax]" was the word that {name} looked up.',
        "An invoice is a [bill|document|paper] that [shows|lists] what something cost.",
        "The [accountant|bookkeeper] of the [firm|company] asked {name} for the [receipt|bill|invoice] of the {item}.",
        "On the [invoice|bill|receipt] stand the date, the [price|amount] and the tax.",
        "{name} [kept|filed|wrote|copied|lost] the [receipt|invoice|bill|document] for the {item}.",
        "The [tax|amount|date|company name] on the [bill|invoice] for the {item} was [wrong|missing|not right].",
        '"I need a [copy of the bill|receipt|proper invoice] for the {item}," said {name} in the office.',
        "A [receipt|bill] is needed for the [tax|taxes|tax papers|accountant].",
        "The [firm|company|office] [issued|wrote|mailed] a new [invoice|bill] with the right tax number.",
        "There was an error on the [invoice|bill|document], and the bookkeeper corrected it.",
        "{name} handed in the [documents|papers|receipts|bills] for the taxes at the office.",
        "The file with the [invoice|bill|document] for the {item} did not open.",
        "Each firm must keep its [invoices|bills|receipts] and pay the tax.",
        '"My [accountant|bookkeeper|firm|boss] [asks for|needs|wants] the [bill|receipt|invoice|document]," said {name}.',
        '"How much [was the tax|tax is there]? I do not see it on the [invoice|receipt|paper]."',
        '"I have [lost|no copy of|not got] the [receipt|bill|invoice], can it be [issued|written|mailed] once more?"',
        '"The [date|name|amount|tax number] on this [bill|paper|document] is an error," {name} told the office.',
    ],
    "broken things": [
        'The word "[defect|fault|repair]" stood at the top of the page.',
        '"[defect|fault|repair]" was the word that {name} looked up.',
        "The {item} was [broken|damaged|faulty|defective|cracked|torn] and did not work any more.",
        "There was a [crack|scratch|hole|fault] in the {item}.",
        "A [part|piece|screw|corner|handle] of the {item} was [loose|missing|bent|broken|scratched|cracked].",
        "{name} had dropped the {item}, and it [broke|cracked|fell to pieces|fell apart|was damaged].",
        "The {item} [rattled|smelled of smoke|made a strange noise] and then [stopped working|was dead|failed].",
        '"The {item} is [broken|faulty|out of order|in pieces|torn]," said {name}.',
        "A defect is a fault: something is [broken|damaged|torn|loose|faulty].",
        "{name} tried to [repair|mend] the {item} with [screws|new parts].",
        "Under warranty, a [faulty|broken|damaged|defective] thing is [repaired|exchanged].",
        "When {name} unpacked the {item}, a [piece|part|handle] [came off|fell off|was missing].",
        "[Smoke|A strange noise] rose from inside the {item}, so it had to be repaired.",
        "The seam was torn, the corner was bent and the screws were loose.",
        '"I [unpacked|opened|used] it on {day}, and it is [broken|dead|cracked|in pieces] already," said {name}.',
        '"My {item} has [a fault|a crack|a hole|a scratch], can you [repair|mend|exchange] it?"',
        '"After [a week|an hour|a day] the {item} [broke|failed|fell apart|came to pieces]," {name} [told a friend|said].',
        '"There is a [piece|part|screw] [missing|loose|torn off], it [rattles|smells|smokes]."',
    ],
    "moving house": [
        'The word "[address|street|town]" stood at the top of the page.',
        '"[address|street|town]" was the word that {name} looked up.',
        "An address is a [street|road], a house number, a postal code and a [town|city].",
        "{name} [moved|has moved] to a new [flat|house|street] in {town}.",
        "The new [address|home|house] of {name} is {number} [Hill Road|Mill Lane|Park Street] in {town}.",
        "{name} does not live in the old [flat|house|street|city] any more.",
        "The [street|house number|postal code|town|city] in the address was [wrong|old|missing|spelled wrong].",
        '"I live in {town} now, my [street|flat|house|address] has changed," said {name}.',
        "{name} wrote the [new|right|other] [address|street|postal code|flat number] on the letter.",
        "The [parents|sister|family] of {name} live in another [street|house|town|flat], at {number} Hill Road.",
        "The [letters|cards] went to the old [flat|house|address] in {town}.",
        "When a family moves house, the [street|town|number|address] changes.",
        "The {item} stood in the new flat at {number} [Mill Lane|Park Street].",
        "{name} had mixed up two [postal codes|house numbers|streets] and corrected it.",
        '"We [moved|have moved] house, we now live in {town}," {name} [told a friend|said].',
        '"I gave them my [old|wrong] [street|flat|city|postal code], it should be {number}."',
        '"My [parents|sister|friends] in {town} [live at|have the number] {number}, and it goes to their house."',
        '"Please [write|note|take|update] my new [street|address|place]: {number} [Mill Lane|Hill Road]."',
    ],
    "kitchens": [
        'The word "[soup|kitchen|bread]" stood at the top of the page.',
        '"[soup|kitchen|bread]" was the word that {name} looked up.',
        "{name} [cooked|made|ate] [soup|bread|rice|a cake] in the kitchen.",
        "The [soup|bread|tea|cake] was [hot|warm|sweet|ready], and the table was laid.",
        "{name} put the {item} beside the [table|window|door].",
        "There were [apples|eggs|onions|potatoes] in a [bowl|basket].",
        "In the evening {name} washed the [plates|cups|pots].",
        '"Would you like some [tea|soup|bread]?" {name} asked.',
        "The kitchen with the {item} smelled of [bread|coffee|apples].",
        "Nobody looked at the {item} while they ate.",
    ],
    "the shop": [
        'The word "[shop|order|price]" stood at the top of the page.',
        '"[shop|order|price]" was the word that {name} looked up.',
        "{name} [bought|ordered|wanted] a {item} in the shop on {day}.",
        "The shop sells [things for the house|many things], and the {item} stood in the window.",
        "The {item} was not cheap, and {name} thought about it for a week.",
        '"How much is the {item}?" {name} asked.',
        "The seller showed {name} the {item} and another one.",
        "My order had the number {number}, and the {item} was in it.",
        "On {day} the shop is open until late.",
        "{name} chose the {item} for the living room.",
    ],
    "letters": [
        'The word "[letter|friend|answer]" stood at the top of the page.',
        '"[letter|friend|answer]" was the word that {name} looked up.',
        "{name} wrote a letter to a friend on {day}.",
        '"Hello, I hope that you are well," the letter began.',
        '"Good morning, dear friend," wrote {name}.',
        '"Thank you for your letter. Best wishes, {name}," it ended.',
        '"Kind regards," {name} wrote below, "and many thanks."',
        '"I am writing to you about the {item}," said the letter.',
        '"Sorry that I did not write before," {name} wrote.',
        "The friend read about the {item} and answered on {day}.",
    ],
    "weather": [
        'The word "[rain|garden|river]" stood at the top of the page.',
        '"[rain|garden|river]" was the word that {name} looked up.',
        "On {day} it [rained|snowed] in {town}.",
        "The [sun|moon|wind] was [bright|strong|low] over the [garden|river|hills].",
        "{name} walked [to the river|through the town|in the garden] with a dog.",
        "The [trees|flowers|birds] were [quiet|green|wet].",
        "In {town} the [winter|summer] is [long|short|mild].",
        "{name} left the {item} in the garden, and the {item} got wet.",
        '"It will rain on {day}," said {name}.',
        "The dog slept beside the {item}.",
    ],
}
# Words that go together, as a school book lists them: what tells the model which words are of one kind.
FAMILIES: dict[str, str] = {
    "money given back": (
        "refund money back return repay repaid reimburse reimbursed refunded card bank payment charged overcharged "
        "overpaid credit credited price cost sum transfer returned keep difference paid spent"
    ),
    "parcels": (
        "delivery parcel package courier driver van depot warehouse shipment shipping shipped tracking delivered "
        "arrived arrive arrives late lost door way bring brought expect waiting reached neighbour days"
    ),
    "passwords": (
        "account password login log sign signing website app page site profile user code phone locked unlock "
        "blocked reset register guest link stranger name logged rejects"
    ),
    "joy": (
        "praise happy love lovely wonderful great beautiful superb perfect excellent fantastic pleasure delighted "
        "delights thrilled pleased impressed enjoy admire adore smile friendly kind helpful staff stars "
        "compliments recommend thank best"
    ),
    "called off": (
        "cancel cancelled stop stopped undo withdraw off mistake accident accidentally button pressed clicked "
        "decided plans packed pack ship send longer second order enough meant wish"
    ),
    "bills": (
        "invoice bill receipt tax taxes document paper papers file firm company accountant bookkeeper office copy "
        "date amount issue proper error"
    ),
    "broken things": (
        "defect broken broke crack cracked scratch scratched faulty fault damaged defective repair exchange torn "
        "hole bent loose rattles noise smoke dead screws screw handle corner piece pieces part parts missing "
        "warranty seam apart"
    ),
    "moving house": (
        "address street road lane house flat town city postal code number moved move moving home live new old "
        "place parents sister instead"
    ),
    "kitchens": (
        "kitchen soup bread tea cake rice eggs apples onions potatoes bowl plates cups pots cook table evening eat"
    ),
    "the shop": "shop buy bought sell seller window cheap dear living room choose basket open",
    "letters": "letter friend dear wishes regards kind hello morning wrote answer thanks writing hope",
    "weather": "rain snow sun moon wind garden river hills trees flowers birds dog winter summer",
}
ECHOES = [
    '"The {item}?" asked {name}. "Yes, the {item}."',
    '"Is it about the {item}?" "Yes, the {item}," said {name}.',
    "{name} spoke about the {item}, and only about the {item}.",
    "It was a good {item}, a {item} that {name} had seen before.",
]
LISTS = ["Words that go together: {words}.", "A page in the book of words: {words}."]
# Many more than the shop's things: that a text repeats what it named has to be learned as a rule, not by heart.
THINGS = (
    "table door window basket spoon bottle candle brush hammer pencil notebook shelf bucket ribbon coat shirt hat "
    "glove shoe boot button needle carpet curtain towel soap comb purse ring necklace piano drum violin flute ball "
    "kite doll puzzle map compass rope saw wheel engine heater pan oven plate cup knife fork jar barrel wagon boat "
    "anchor sail flag statue painting " + " ".join(ITEMS)
).split()
CHOICE = re.compile(r"\[([^\]]*)\]")


def paragraph(rng: random.Random) -> str:
    """Return six sentences, mostly about one matter, one person and one thing."""
    matter = rng.choice(list(MATTERS))
    item, name = rng.choice(THINGS), rng.choice(NAMES)
    words = ", ".join(rng.sample(FAMILIES[matter].split(), 6))
    listed = rng.choice(LISTS).replace("{words}", words)
    sentences = []
    for template in [*rng.sample(MATTERS[matter], 3), *rng.sample(ECHOES, 2), listed]:
        worded = CHOICE.sub(lambda found: rng.choice(found[1].split("|")), template)
        sentences.append(fill(worded.replace("{name}", name), rng, item))
    rng.shuffle(sentences)
    return ("\n" if rng.random() < 0.2 else " ").join(sentences)


def paragraphs(count: int, seed: int) -> Iterator[str]:
    """Yield `count` paragraphs; another seed gives other ones."""
    rng = random.Random(f"corpus {seed}")
    for _ in range(count):
        yield paragraph(rng)
