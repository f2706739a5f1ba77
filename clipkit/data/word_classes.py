"""Words that exclude each other in a picture, written for clipkit: one class per line, its words separated by
commas, spellings of one word by a stroke.

Where one word of a class is true of a thing, no other of its line is. Left out: words that overlap with
another of their class (crimson and red, couple and two), and names of things that are parts of others.
"""

from __future__ import annotations

_QUALITIES = """
red, green, blue, yellow, white, black, brown, pink, purple, orange, grey|gray
two, three, four, five, six, seven, eight, nine, ten
big|large, small|little
tall, short
long, short
young, old
left, right
above, below
inside, outside
indoors, outdoors
front, back
open, closed
empty, full
wet, dry
clean, dirty
smiling, frowning
running, swimming
asleep, awake
wooden, metal, plastic, glass, stone, paper
round, square, triangular
striped, dotted, checked
day, night
morning, evening
summer, winter
sunny, rainy, snowy
mens, womens
"""

_THINGS = """
man, woman
men, women
boy, girl
dog, cat, horse, cow, sheep, goat, pig, elephant, giraffe, zebra, bear, lion, tiger, monkey, rabbit, mouse
bird, fish, snake, frog, turtle, butterfly, spider
chicken, duck, goose, owl, eagle, parrot, penguin, swan
car, bus, truck, train, bicycle, motorcycle, boat, airplane, helicopter, tractor
table, chair, bed, sofa, shelf, lamp
cup, bowl, plate, bottle, fork, knife, spoon
apple, banana, grape, lemon, cherry, strawberry, pear, peach, pineapple, watermelon
carrot, potato, tomato, onion, cucumber, mushroom
pizza, sandwich, burger, salad, soup, cake
shirt, jacket, dress, skirt, trousers, sweater
hat, scarf, glove, sock, shoe, boot, sandal
guitar, piano, violin, drum, trumpet, flute
football, tennis, baseball, basketball, golf
beach, forest, desert
kitchen, bedroom, bathroom, office
circle, square, triangle, star, heart, cross
"""

Spellings = tuple[str, ...]


def _classes(text: str) -> tuple[tuple[Spellings, ...], ...]:
    lines = text.strip().splitlines()
    return tuple(tuple(tuple(word.strip().split("|")) for word in line.split(",")) for line in lines)


QUALITIES = _classes(_QUALITIES)
"""Classes of qualities, numbers and places: per class its words, each with its spellings, in lower case."""

THINGS = _classes(_THINGS)
"""Classes of persons and things, in the singular unless the plural is another word."""
