"""The course: exercises made from the lecture's own files, and their grader.

    python -m course list                        chapters, exercises, points, minutes
    python -m course make my_work                a copy of the project without the bodies of the exercises' functions
    python -m course make my_work --chapter 3    the same, with only one chapter cut out
    python -m course pack                        in such a copy: the zip to hand in
    python -m course grade my_work               points, one line an exercise, and pictures: of a wrong one two
    python -m course grade my_work --chapter 3 --seed 4711 --json points.json      other random inputs
    python -m course grade-class handed_in --chapters 1,2 --seed 4711              a row for each hand-in
    python -m course gradescope-zip --chapters 1,2                                 an autograder for Gradescope
    python -m course check                       the lecturer's own test of the course

An exercise is a function of the project (course/exercises.py). `make` keeps its signature and docstring and replaces
the rest by `raise NotImplementedError("exercise 1.3: ...")`.

`grade` takes each exercise by itself. It keeps everything in the student's file except the functions of all OTHER
exercises, which it puts back. So a mistake costs its own points only, whatever else it breaks. (A student's own copy
has nothing to put back: there it says which wrong exercise blocks another.) The student's code runs in a process of its
own with limits of time and memory, and returns numbers only. Another process judges them: shapes first, then laws, then
equality with a slow specification on random inputs. If the numbers match a typical mistake, the message names it.

The grader is no sandbox: a student's file can do to the machine what you can. Grade strangers' work in a container
(grade-class --witness; the project's course/README.md has an example).
"""
import argparse
import sys

from plumbing import UserError
from plumbing.files import prepare_output, silence

from course.exercises import CHAPTERS, chosen, EXERCISES
from course.handout import make, pack


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


def exercise(text):
    """Read the number of an exercise."""
    if text not in [e.number for e in EXERCISES]:
        raise argparse.ArgumentTypeError("want one exercise, like 1.3; several: --chapters")
    return text


def chapters(text):
    """Return the chapters of a list like 1,2: an argparse type."""
    named = [int(part) for part in text.split(",")]
    if unknown := [number for number in named if number not in CHAPTERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: want {min(CHAPTERS)} to {max(CHAPTERS)}")
    return named


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line. (That of plumbing.settings imports PyTorch, which takes seconds.)"""

    def error(self, message):
        raise UserError(message)


def parse():
    parser = OneLine(prog="course", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = parser.add_subparsers(dest="what", required=True, 
                                     metavar="list | make | pack | grade | grade-class | gradescope-zip | check")
    programs.add_parser("list", help="list the exercises")
    copy = programs.add_parser("make", help="make a student's copy")
    grade = programs.add_parser("grade", help="grade a student's copy")
    many = programs.add_parser("grade-class", help="grade a folder of hand-ins: folders, or zips of `pack`")
    check = programs.add_parser("check", help="test the course: full marks, stubs, and every typical mistake")
    for program in (copy, grade, many):
        program.add_argument("folder", metavar="DIR")
    for program in (copy, grade, many):
        program.add_argument("--chapters", "--chapter", metavar="1,2", type=chapters, required=program is many,
                             help="these chapters only")
    for program in (grade, many, check):
        program.add_argument("--seed", type=whole(0, 2 ** 31 - 1), default=0, help="of the random inputs (default 0)")
    for program in (grade, many):
        program.add_argument("--limit", type=whole(1, 3600), default=20,
                             help="seconds an exercise may take (default 20)")
    grade.add_argument("--json", metavar="FILE", help="also write the points to this file")
    grade.add_argument("--no-pictures", action="store_true")
    grade.add_argument("--only", metavar="1.3", type=exercise, help="this exercise only")
    grade.add_argument("--gradescope", metavar="FILE", help="grade as grade-class does, and write this file instead")
    for program in (grade, many):
        program.add_argument("--witness", metavar="COMMAND", help="grade-class, --gradescope: starts Python for the "
                             "students' code, for example as another user or in a container; {room} is the folder that "
                             "it needs")
    many.add_argument("--out", metavar="DIR", default="points", help="a new folder for points.csv (default points)")
    zipped = programs.add_parser("gradescope-zip", help="write the zip of a Gradescope autograder")
    zipped.add_argument("--chapters", metavar="1,2", type=chapters, required=True)
    zipped.add_argument("--seed", type=whole(0, 2 ** 31 - 1), help="of the random inputs (default: a new one)")
    zipped.add_argument("--out", metavar="FILE", default="gradescope.zip")
    packed = programs.add_parser("pack", help="in a student's copy: write the zip to hand in")
    packed.add_argument("--out", metavar="FILE", default="hand_in.zip")
    return parser.parse_args()


def main():
    args = parse()
    if args.what == "list":
        return show()
    if args.what == "make":
        return make(args.folder, args.chapters)
    if args.what == "pack":
        return pack(args.out)
    from course import check, judge                                       # they import PyTorch, which takes seconds
    if args.what == "check":
        return 1 if check.check(args.seed) else 0
    if args.what == "gradescope-zip":
        from course import gradescope
        return gradescope.make_zip(args.chapters, args.seed, args.out)
    if args.what == "grade-class":
        from course import classes
        return classes.grade_class(args.folder, chosen(args.chapters), args.seed, args.limit, args.out, args.witness)
    if args.gradescope:
        from course import gradescope
        return gradescope.grade(args.folder, chosen(args.chapters), args.seed, args.limit, args.gradescope,
                                args.witness)
    judge.grade(args.folder, args.chapters, args.seed, args.limit, not args.no_pictures, args.json, args.only)


if __name__ == "__main__":
    prepare_output()
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:                                               # `... | head` closed the pipe: no mistake
        silence(sys.stdout)
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"course: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
