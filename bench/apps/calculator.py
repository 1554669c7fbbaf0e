"""A web application as there are many: Django with its admin, users and sessions, a database, and a
library that is large, SymPy. `GET /calculate?q=EXPRESSION` says what it simplifies to. It waits for
nothing: that it takes a second until it listens is all imports, migrations and a table."""

from wsgiref.simple_server import WSGIRequestHandler, make_server

import django
from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="of a benchmark",
    ROOT_URLCONF=__name__,
    SITE_ID=1,
    USE_TZ=True,
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=[
        f"django.contrib.{name}"
        for name in (
            "admin",
            "auth",
            "contenttypes",
            "flatpages",
            "humanize",
            "messages",
            "redirects",
            "sessions",
            "sitemaps",
            "sites",
            "staticfiles",
            "syndication",
        )
    ],
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    ],
    TEMPLATES=[
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "APP_DIRS": True,
            "OPTIONS": {
                "context_processors": [
                    "django.template.context_processors.request",
                    "django.contrib.auth.context_processors.auth",
                    "django.contrib.messages.context_processors.messages",
                ]
            },
        }
    ],
)
django.setup()

import sympy  # noqa: E402
import sympy.physics.mechanics  # noqa: E402
import sympy.physics.optics  # noqa: E402
import sympy.physics.quantum  # noqa: E402
import sympy.physics.units  # noqa: E402
import sympy.stats  # noqa: E402
from django.contrib import admin  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.core.wsgi import get_wsgi_application  # noqa: E402
from django.http import HttpRequest, HttpResponse  # noqa: E402
from django.urls import path, re_path  # noqa: E402

X = sympy.symbols("x")
FUNCTIONS = (sympy.sin, sympy.cos, sympy.sinh)
TABLE = {f: sympy.integrate(f(X) ** 2 * sympy.exp(X), X) for f in FUNCTIONS}


def calculate(request: HttpRequest) -> HttpResponse:
    question = request.GET.get("q", "sin(x)**2 + cos(x)**2")
    return HttpResponse(f"{sympy.simplify(question)}\n", content_type="text/plain")


def show_table(request: HttpRequest) -> HttpResponse:
    lines = (f"{function}(x)**2*exp(x): {integral}\n" for function, integral in TABLE.items())
    return HttpResponse("".join(lines), content_type="text/plain")


class Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """It has no log of requests."""


urlpatterns = [
    path("admin/", admin.site.urls),
    path("calculate", calculate),
    path("table", show_table),
    re_path("", lambda request: HttpResponse("hello\n", content_type="text/plain")),
]
call_command("check")
call_command("migrate", verbosity=0)
make_server("", 8080, get_wsgi_application(), handler_class=Silent).serve_forever()
