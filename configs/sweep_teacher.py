"""The temperature of the teacher: the same tasks, answered by one endpoint at .2, .3 and .5.

Command:  python launch/sweep.py --config=configs/sweep_teacher.py --out=runs/teacher
Hardware: 2 CPU cores, 8 GB, and before that a served teacher (docs/teacher.md).
Time:     nine runs of smollm2_cpu.py (see reports/demo.md), and the teacher's own time for three data sets.
Result:   at a reduced size in reports/training/stage2.md. A reward is likeness to the cell's own teacher, so
          execution success is what compares cells.

With the model that configs/teacher.yaml names nothing is kept (reports/data.md): put a better one there first. Its data
sets, each from a teacher.yaml that differs in one number, with one store for all answers:

  for t in 0.2 0.3 0.5; do
    sed "s/temperature: 0.3/temperature: $t/" configs/teacher.yaml > teacher-$t.yaml
    python launch/prepare_data.py --config=configs/data_demo.py --teacher=teacher-$t.yaml --store=data/teacher \
      --out=data/teacher-$t
  done

configs/teacher_student.yaml in place of teacher.yaml has a student of ours, served by launch/serve.py, teach.
"""

from srl_jax.sweep import Sweep


def get_config() -> Sweep:
    return Sweep(
        base="configs/smollm2_cpu.py",
        seeds=(0, 1, 2),
        cells={f"temperature_{t}": {"data.dir": f"data/teacher-{t}"} for t in ("0.3", "0.2", "0.5")},
    )
