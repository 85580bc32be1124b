"""Four small handbooks, made up, with what people ask of them: what a page answers, by the words that must be quoted, and what none does."""


def pages(handbook: str) -> dict[str, str]: # Name of the file -> Markdown
    "The pages of a handbook: each begins with @ and its name."
    return {name.strip(): text for name, _, text in (page.partition("\n") for page in handbook.split("@")[1:])}


KETTLES = """
@contact.md
# Contact

## By telephone

Our service answers the telephone from Monday to Friday between nine and five.

## By letter

Letters reach us at Kettle Street 7, and are answered within ten days.

@delivery.md
# Delivery

## How long it takes

A parcel within the country arrives two working days after the order. Islands take up to six working days.

## What it costs

Delivery is free for orders above fifty euros, and costs four euros and ninety cents below that.

@descaling.md
# Descaling

## When

Descale the kettle when the light turns orange, which happens after about sixty fillings. In regions with hard water this is every month.

## How

Empty one sachet into half a litre of cold water, heat it once and leave it for twenty minutes.

@hours.md
# Opening hours

## The shop

The shop in the station is open from eight in the morning until nine in the evening on weekdays. On Sundays it is closed.

@jobs.md
# Jobs

## Applying

Applications are read by two people of the team, and everybody gets an answer within three weeks.

@pairing.md
# Pairing with the app

## First pairing

Hold the button on the charging base for five seconds until the light blinks blue. The app then finds the kettle by itself.

## A new phone

Remove the kettle from the old phone first, because it keeps only one pairing at a time.

@prices.md
# Prices

## Kettles

The kettle Alba costs seventy-nine euros and the kettle Nero costs one hundred and nineteen euros.

## Spare parts

A spare lid costs nine euros, and a set of three filters costs twelve euros.

@recycling.md
# Recycling

## Old kettles

Bring your old kettle to any of our shops, and we recycle it free of charge whatever its brand is.

@repair.md
# Repairs

## In the shop

A repair in the shop takes forty-five minutes and costs twenty-five euros without parts.

## Spare lids

A broken lid can be changed at home without any tool.

@returns.md
# Returns

## How long you have

You may send back what you bought within thirty days of the delivery. Keep the receipt, since we ask for it when the parcel arrives.

## What we do not take back

Opened filters and sachets of descaler cannot be returned for reasons of hygiene.

@safety.md
# Safety

## Children

The lid locks while the water is above sixty degrees, so that nobody opens it by accident.

## Boiling dry

The kettle switches itself off after eight seconds when there is no water in it.

@warranty.md
# Warranty

## Length

Every kettle has a warranty of three years from the date on the receipt. The charging base is covered for one year only.

## Water damage

The warranty does not cover damage by water that was spilt over the charging base.
"""

# What a new customer asks, and what stands on the page that answers it
NEWCOMER = {
    "How many days do I have to return something?": ("thirty days", "returns.md"), "Is water damage covered?": ("not cover", "warranty.md"),
    "What does the Nero cost?": ("hundred and nineteen", "prices.md"), "When must I descale?": ("light turns orange", "descaling.md"),
    "How do I descale?": ("half a litre", "descaling.md"), "How much is a spare lid?": ("nine euros", "prices.md"),
    "How do I pair the kettle with a new phone?": ("old phone", "pairing.md"),
    "Are you open on Sundays?": ("closed", "hours.md"), "How long is the warranty on the charging base?": ("one year", "warranty.md"),
    "Can I return an opened filter?": ("cannot be returned", "returns.md"), "Why does the lid lock?": ("sixty degrees", "safety.md"),
    "What is delivery to an island like?": ("six working days", "delivery.md"), "Who reads my application?": ("two people", "jobs.md"),
}

KETTLES_CANNOT = [
    "Who founded the company?",
    "Do you sell coffee machines?",
    "Can I pay by instalments?",
    "What is the email address of the service?",
    "Does the kettle come in red?",
    "How loud is the kettle?",
    "Is there a student discount?",
    "How many litres does the Nero hold?",
    "Can I order a gift card?",
    "How do I reset the app password?",
    "Do you deliver to Norway?",
    "What does the kettle weigh?",
]


CLUB = """
@membership.md
# Membership

## Joining

You become a member by filling in the form on the board and paying the fee of the current year. New members start with a trial month in which they may leave without paying.

## Leaving

A member who wants to leave writes to the secretary before the first of October. The fee of the running year is not paid back.

@fees.md
# Fees

| Group | Fee a year |
|---|---|
| Adults | 120 euros |
| Students | 60 euros |
| Families | 200 euros |

Fees are drawn from your account in February.

@boats.md
# Boats

## Booking

A boat is booked in the book beside the door, at most three days ahead. Each member may hold two bookings at a time.

## Damage

Whoever damages a boat writes it into the red book on the same day, even if it is only a scratch. The club's insurance pays beyond the first 150 euros.

@safety.md
# On the water

## Life jackets

Life jackets are compulsory for everybody under sixteen, and for all members from November to March.

## Storm

When the yellow light at the harbour blinks, all boats return at once.

@training.md
# Training

## For beginners

Beginners row on Tuesdays and Thursdays at six in the evening with Marta. Bring shoes with a light sole.

## For racers

The racing team meets on Saturdays at eight in the morning. Whoever misses three trainings in a row loses the seat.

@house.md
# The boathouse

## Keys

A key costs a deposit of thirty euros and is handed out by the caretaker. Lost keys are reported to the caretaker within a day.

## Showers

The showers run with coins of fifty cents for four minutes of warm water.

@guests.md
# Guests

Guests may row three times a year with a member. Each visit costs five euros, and the member answers for the guest.

@work.md
# Work for the club

Every adult member works eight hours a year for the club. Each hour that is missing costs fifteen euros.

@races.md
# Races

## The summer race

The summer race is held on the second Sunday of July between the two bridges. Entries close a week before.

## Travel

The club pays half of the train fare to races that the board has chosen.
"""

CLUB_ANSWERS = {
    "What does a student pay?": "60",
    "When do I have to tell you that I want to leave?": "first of October",
    "How far ahead can I reserve a boat?": "three days",
    "I scratched a boat, what now?": "red book",
    "Do I need a life jacket in January?": "November to March",
    "When do beginners train?": "Tuesdays",
    "What happens if I miss trainings?": "loses the seat",
    "How much is a key?": "thirty",
    "How long does the warm water last?": "four minutes",
    "How often may a friend come along?": "three times",
    "How many hours do I have to work?": "eight hours",
    "When is the summer race?": "second Sunday",
    "Do you pay for the train?": "half of the train",
    "What does a family pay?": "200",
    "When is the fee drawn?": "February",
}

CLUB_CANNOT = [
    "Is there a bar in the boathouse?",
    "How old is the club?",
    "Who is the president of the club?",
    "Can I bring my dog on a boat?",
    "How many boats does the club have?",
    "Is there parking at the boathouse?",
    "Can I pay the fee in cash?",
    "What is the wifi password?",
    "How deep is the river?",
    "Do you rent kayaks?",
    "When is the winter party?",
    "How much does a new boat cost?",
]


SUPPORT = """
@laptop.md
# Laptops

## A new laptop

Laptops are replaced after four years. Order the new one in the portal under Hardware, and your lead approves it.

## A broken laptop

Bring a broken laptop to the service desk in room 114. You get a loan device until yours is repaired.

@vpn.md
# VPN

## Connecting

Start the client Harbor, choose the gateway Berlin and sign in with your badge number. The connection ends by itself after ten hours.

## From abroad

From outside the European Union the VPN works only if security has unlocked your account; ask them five days before you travel.

@passwords.md
# Passwords

A password has at least fourteen characters and is changed once a year. After six wrong attempts the account is locked for thirty minutes.

@printing.md
# Printing

Prints wait on any printer for twelve hours until you hold your badge to it. Colour prints are charged to your cost centre.

@backup.md
# Backups

The home drive is saved every night and kept for ninety days. Files on the desktop are not saved.

@software.md
# Software

## Installing

Approved software is installed from the catalogue without a request. Anything else needs a ticket with the licence and the name of the owner.

@phones.md
# Phones

Company phones are for employees who are on call. Private apps are allowed as long as the phone is enrolled.

@oncall.md
# On call

## Times

The on-call week begins on Monday at nine. Whoever is on call answers within fifteen minutes.

## Pay

An on-call week is paid with 300 euros, and each hour of work at night with a free hour.

@incidents.md
# Incidents

## Severity one

A severity one incident is one in which customers cannot order. Call the duty manager, then open the bridge in the channel war-room.

## After it

The review is written within three working days and blames nobody.

@access.md
# Access

Access to production is granted for eight hours at a time by a second engineer. Everything that is typed there is recorded.
"""

SUPPORT_ANSWERS = {
    "When do I get a new laptop?": "four years",
    "My laptop is broken, where do I go?": "114",
    "How do I connect to the VPN?": "Harbor",
    "Can I use the VPN from the United States?": "unlocked",
    "How long must a password be?": "fourteen",
    "My account is locked, how long does it take?": "thirty minutes",
    "How long do prints wait?": "twelve hours",
    "Are files on my desktop backed up?": "not saved",
    "How long are backups kept?": "ninety days",
    "How do I install software?": "catalogue",
    "May I use private apps on the company phone?": "allowed",
    "How fast must I answer when on call?": "fifteen minutes",
    "What is paid for a week on call?": "300",
    "What counts as severity one?": "cannot order",
    "How do I get access to production?": "second engineer",
    "When is the review of an incident due?": "three working days",
}

SUPPORT_CANNOT = [
    "How do I book a meeting room?",
    "What is the name of the CTO?",
    "Can I get a second monitor?",
    "How do I set up two-factor authentication?",
    "How many days of holiday do I have?",
    "Which antivirus do we use?",
    "Can I work from home on Fridays?",
    "How do I reset my badge?",
    "What is the wifi password for guests?",
    "How large is the home drive?",
    "How do I expense a taxi?",
    "Which cloud provider do we use?",
]


SKIING = """
@lessons.md
# Lessons

## Groups

A group has at most nine pupils and skis from ten to twelve and from one to three.

## Private lessons

A private lesson lasts two hours and costs 160 euros for one or two people; each further person pays 20 euros.

@children.md
# Children

## The snow garden

Children from four years on start in the snow garden beside the lower station. Parents wait in the café, not in the garden.

## Lunch

Children who stay all day eat in the hut at noon. Lunch costs eleven euros; tell us about allergies when you book.

@booking.md
# Booking

Book online until six in the evening of the day before. A deposit of a third is due at once, the rest on the first day.

@cancelling.md
# Cancelling

Up to seven days before the course you get everything back. After that we keep the deposit, unless a doctor confirms that you are ill.

@rental.md
# Rental

## What we rent

Skis, boots and helmets can be rented in the cellar of the school. A set for a day costs 35 euros, a helmet alone five.

## Damage

Scratches are free, a broken ski costs half of its price.

@meeting.md
# Meeting point

All courses meet at the blue flag behind the ticket office, fifteen minutes before they begin. Whoever is late calls the office.

@weather.md
# Weather

In a storm the lifts close, and the course is moved to the hall, where we practise balance. Nothing is paid back for that.

@tests.md
# Tests and races

On Friday there is a race for all groups. Everybody gets a medal, and the times hang in the window of the office.

@passes.md
# Lift passes

The lift pass is not part of the price of a course. Pupils get ten percent off at the ticket office with their course card.

@teachers.md
# Teachers

All teachers speak German and English, some French or Italian. Each is examined by the association every three years.

@snowboard.md
# Snowboard

Snowboard courses are for people from eight years on, and begin every Monday.

@insurance.md
# Insurance

You need an accident insurance of your own. The school's insurance pays only for faults of our teachers.
"""

SKIING_ANSWERS = {
    "How big are the groups?": "nine",
    "What does a private lesson cost?": "160",
    "From what age can my daughter join?": "four years",
    "Can I stay with my child in the snow garden?": "café",
    "How much is lunch?": "eleven",
    "Until when can I book?": "six in the evening",
    "Do I get my money back if I cancel ten days before?": "seven days",
    "I am ill and cannot come, what about the deposit?": "doctor",
    "What does it cost to rent skis for a day?": "35",
    "What if I break a ski?": "half of its price",
    "Where do we meet?": "blue flag",
    "What happens in bad weather?": "hall",
    "When is the race?": "Friday",
    "Is the lift pass included?": "not part",
    "Which languages do the teachers speak?": "German",
    "When do snowboard courses start?": "Monday",
    "Am I insured in the course?": "accident insurance",
}

SKIING_CANNOT = [
    "Do you offer lessons at night?",
    "Can I buy skis from you?",
    "Is there a car park?",
    "What is your telephone number?",
    "Do you teach cross-country skiing?",
    "Can grandparents watch the race from the hut?",
    "How high is the mountain?",
    "Which wax do you use?",
    "Do you have vegetarian lunch?",
    "Can I bring my dog?",
    "Who owns the school?",
    "How long is the season?",
    "Is there a sauna?",
    "May teachers accept tips?",
]


HANDBOOKS = dict(
    kettles=(KETTLES, {question: words for question, (words, _) in NEWCOMER.items()}, KETTLES_CANNOT),
    club=(CLUB, CLUB_ANSWERS, CLUB_CANNOT), support=(SUPPORT, SUPPORT_ANSWERS, SUPPORT_CANNOT),
    skiing=(SKIING, SKIING_ANSWERS, SKIING_CANNOT),
)
