"""The course: exercises made from the lecture's own files, and their grader.

    python -m course list                        chapters, exercises, points, minutes
    python -m course make my_work                a copy of the project without the bodies of the exercises' functions
    python -m course make my_work --chapter 3    the same, with only one chapter cut out
    python -m course grade my_work               points, one line an exercise, and pictures: of a wrong one two
    python -m course grade my_work --chapter 3 --seed 4711 --json points.json      other random inputs
    python -m course check                       the lecturer's own test of the course

An exercise is a function of the project (course/exercises.py). `make` keeps its signature and docstring and replaces
the rest by `raise NotImplementedError("exercise 1.3: ...")`.

`grade` takes each exercise by itself. It keeps everything in the student's file except the functions of all OTHER
exercises, which it puts back. So a mistake costs its own points only, whatever else it breaks. (A student's own copy
has nothing to put back: there it says which wrong exercise blocks another.) The student's code runs in a process of its
own with limits of time and memory, and returns numbers only. Another process judges them: shapes first, then laws, then
equality with a slow specification on random inputs. If the numbers match a typical mistake (course/mutants.py), the
message names it.

The grader is no sandbox: a student's file can do to the machine what you can. Grade strangers' work in a container.
"""
import argparse
import sys

from plumbing import UserError
from plumbing.files import escape_odd_names

from course.exercises import CHAPTERS, EXERCISES
from course.handout import make


def show():
    """Print the table of exercises."""
    for number, title in CHAPTERS.items():
        rows = [e for e in EXERCISES if e.chapter == number]
        print(f"{number} {title}: {sum(e.points for e in rows)} points, {sum(e.minutes for e in rows)} minutes")
        for e in rows:
            print(f"   {e.number}  {e.points} points {e.minutes:3d} min  {e.title} ({e.target})")
    print(f"{len(EXERCISES)} exercises, {sum(e.points for e in EXERCISES)} points")


def whole(low, high):
    """Return an argparse type: an integer from low to high."""
    def number(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: want {low} to {high}")
        return value
    return number


def parse():
    parser = argparse.ArgumentParser(prog="course", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = parser.add_subparsers(dest="what", required=True, metavar="list | make | grade | check")
    programs.add_parser("list", help="list the exercises")
    copy = programs.add_parser("make", help="make a student's copy")
    grade = programs.add_parser("grade", help="grade a student's copy")
    check = programs.add_parser("check", help="test the course: full marks, stubs, and every typical mistake")
    for program in (copy, grade):
        program.add_argument("folder", metavar="DIR")
        program.add_argument("--chapter", type=int, choices=CHAPTERS, help="this chapter only")
    for program in (grade, check):
        program.add_argument("--seed", type=whole(0, 2 ** 31 - 1), default=0, help="of the random inputs (default 0)")
    grade.add_argument("--json", metavar="FILE", help="also write the points to this file")
    grade.add_argument("--limit", type=whole(1, 3600), default=20, help="seconds an exercise may take (default 20)")
    grade.add_argument("--no-pictures", action="store_true")
    return parser.parse_args()


def main():
    args = parse()
    if args.what == "list":
        return show()
    if args.what == "make":
        return make(args.folder, args.chapter)
    from course import check, judge                                       # they import PyTorch, which takes seconds
    if args.what == "check":
        return 1 if check.check(args.seed) else 0
    judge.grade(args.folder, args.chapter, args.seed, args.limit, not args.no_pictures, args.json)


if __name__ == "__main__":
    escape_odd_names()
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"course: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
